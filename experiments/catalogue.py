"""All that the command line can be asked for, by name."""

from experiments.arrhythmia import ARRHYTHMIA
from experiments.attribute import ATTRIBUTE
from experiments.bench_aggregators import aggregator_speed
from experiments.bench_codecs import entropy_figures
from experiments.bench_cost import cost_model_figures
from experiments.bench_dp import audit_power, dp_overhead
from experiments.bench_faults import bench_faults
from experiments.bench_he import he_overhead_figures
from experiments.bench_import import import_time
from experiments.bench_mpc import mpc_overhead_figures
from experiments.bench_planner import planner_figures
from experiments.bench_split import split_overhead
from experiments.bench_transport import many_clients, transport_overhead
from experiments.compression import COMPRESSION
from experiments.continual import CONTINUAL, TASK_METHODS
from experiments.controller import CONTROLLER
from experiments.courses import PARADIGMS
from experiments.credit_scoring import CREDIT_SCORING
from experiments.detection import DETECTION
from experiments.early_exits import EARLY_EXITS
from experiments.enclave import ENCLAVE
from experiments.experiment import Experiment
from experiments.he_overhead import HE_OVERHEAD
from experiments.ingredients import ATTACKS, BUILT_ATTACKS, DETECTORS, PROTECTIONS, PROTOCOLS
from experiments.label_ingredients import LABEL_ATTACKS, LABEL_PROTECTIONS
from experiments.label_leakage import LABEL_LEAKAGE
from experiments.mechanisms import MECHANISMS
from experiments.membership import MEMBERSHIP
from experiments.mpc_overhead import MPC_OVERHEAD
from experiments.non_iid import NON_IID
from experiments.paradigms import COMPARISON
from experiments.parity import PARITY
from experiments.parts import Bench
from experiments.poison_ingredients import POISON_ATTACKS, POISON_DEFENSES
from experiments.poisoning import BACKDOOR, POISONING, PRIVACY_MEETS_POISONING, SURFACE
from experiments.privacy_utility import PRIVACY_UTILITY
from experiments.protection_grid import PROTECTION_GRID
from experiments.reconstruction import DEFENSE_TOURNAMENT, RECONSTRUCTION_ATTACKS
from experiments.text_classification import TEXT_CLASSIFICATION
from experiments.tradeoff import TRADEOFF
from experiments.unlike import METHODS
from experiments.updates import UPDATE_ATTACKS

__all__ = [
    "ATTACKS", "BENCHES", "BUILT_ATTACKS", "DETECTORS", "EXPERIMENTS", "LABEL_ATTACKS", "LABEL_PROTECTIONS",
    "MECHANISMS", "METHODS", "PARADIGMS", "POISON_ATTACKS", "POISON_DEFENSES", "PROTECTIONS", "PROTOCOLS",
    "TASK_METHODS", "UPDATE_ATTACKS",
]  # fmt: skip

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        TRADEOFF,
        PROTECTION_GRID,
        RECONSTRUCTION_ATTACKS,
        DEFENSE_TOURNAMENT,
        DETECTION,
        LABEL_LEAKAGE,
        MEMBERSHIP,
        ATTRIBUTE,
        POISONING,
        BACKDOOR,
        SURFACE,
        PRIVACY_MEETS_POISONING,
        COMPARISON,
        COMPRESSION,
        EARLY_EXITS,
        ENCLAVE,
        CONTROLLER,
        PRIVACY_UTILITY,
        HE_OVERHEAD,
        MPC_OVERHEAD,
        NON_IID,
        CONTINUAL,
        PARITY,
        ARRHYTHMIA,
        CREDIT_SCORING,
        TEXT_CLASSIFICATION,
    )
}

BENCHES: dict[str, Bench] = {
    "split-overhead": Bench("what splitting costs in time and bytes, against the same step unsplit", split_overhead),
    "dp": Bench("what DP-SGD costs in time: per-sample and ghost clipping, against the plain split step", dp_overhead),
    "audit": Bench(
        "how well the audit bounds ε from below, convicts planted faults and spares the honest", audit_power
    ),
    "he": Bench(
        "what encryption on the cut costs in time and bytes, against TenSEAL's own tensors", he_overhead_figures
    ),
    "mpc": Bench("what computing on shares costs in time and bytes, against CrypTen alone", mpc_overhead_figures),
    "aggregators": Bench(
        "how fast robust aggregation is, 100 clients × 100,000 numbers, against the obvious torch", aggregator_speed
    ),
    "transport": Bench("what gRPC with mutual TLS costs over bare gRPC, and over one process", transport_overhead),
    "clients": Bench("seconds and bytes of 1 to 64 clients at once, and how well 8 foretell 64", many_clients),
    "entropy": Bench("how near entropy coding comes to the entropy, on what a trained bottom sends", entropy_figures),
    "cost-model": Bench(
        "how well the cost model foretells seconds of models that it was not fitted on", cost_model_figures
    ),
    "planner": Bench(
        "does the planner find what measuring everything finds, and in how many trainings", planner_figures
    ),
    "faults": Bench("a server and clients killed 50 times in mid-training: does the model show it?", bench_faults),
    "import": Bench("what `import splitlearn` takes beyond `import torch`", import_time),
}
