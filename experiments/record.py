"""The record: what one trial was, what it cost, what it reached and what still leaked. One JSON file a trial."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["IMPROVING", "UNDERTRAINED", "Leakage", "Record", "trial_hash"]

Json = Any
IMPROVING = "still improving"
UNDERTRAINED = "UNDERTRAINED"
LOWER_IS_BETTER = frozenset({"mse", "mae", "rmse", "lpips", "loss"})  # for the attacker; other metrics are to be high


class Leakage(BaseModel):
    """What one attack got from one view. ``advantage`` in [0, 1] is over the best no-observation baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")  # a PSNR may be infinite

    attack: str
    family: Literal["reconstruction", "label", "membership", "property", "poisoning", "backdoor"]
    advantage: float = Field(ge=0, le=1)
    metrics: dict[str, float]  # for reconstruction: mse, psnr, ssim, and quantiles such as mse_q10
    baselines: dict[str, float]  # what an attacker who saw nothing reaches: mse_mean_image, mse_class_mean_image
    details: dict[str, Json] = Field(default_factory=dict)  # settings, budget and evidence of convergence

    @property
    def standing(self) -> str:
        """How far the attack's own training came; empty where it has none, or does not say."""
        if self.details.get("undertrained"):
            return UNDERTRAINED
        converged = self.details.get("evidence", {}).get(self.details.get("best"), {}).get("converged")
        return "" if converged is None else "converged" if converged else IMPROVING

    def baseline(self, metric: str) -> float | None:
        """Return the strongest baseline of ``metric`` (``mse`` reads ``mse`` and ``mse_…``), or None without one."""
        values = [value for name, value in self.baselines.items() if name == metric or name.startswith(f"{metric}_")]
        return (min if metric in LOWER_IS_BETTER else max)(values, default=None)


class Record(BaseModel):
    """One trial. ``trial`` is the hash of experiment and full configuration; it names the folder of this record."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")  # a PSNR may be infinite

    format: Literal[1] = 1
    experiment: str
    trial: str
    config: dict[str, Json]  # the full configuration, seed included
    command: str  # reproduces this trial
    status: Literal["done", "failed"]
    error: str | None = None  # the last line of the traceback; the whole of it lies beside the record
    seed: int
    data: str
    protocol: str
    cut: str
    protection: str  # "none" where there is none
    strength: str  # in the protection's own unit, as given at the command line; "" where it has none
    utility: dict[str, float] = Field(default_factory=dict)  # accuracy, macro_f1, auc
    leakage: list[Leakage] = Field(default_factory=list)
    nbytes: dict[str, dict[str, int]] = Field(default_factory=dict)  # direction (up, down) -> message kind -> bytes
    seconds: dict[str, float] = Field(default_factory=dict)  # by phase: data, train, attack …
    peak_memory_bytes: int = 0  # resident memory of the whole process at its highest, interpreter included
    epsilon: float | None = None  # of a mechanism with a proof; None where none is claimed
    delta: float | None = None  # that ε is claimed at
    epsilon_lower: float | None = None  # what an audit bounds ε by from below, at the confidence it says
    mse_bound: float | None = None  # least mean squared error of an unbiased attacker, by Fisher information
    accounts: list[str] = Field(default_factory=list)  # what was released, an account a line; never added up
    visible: dict[str, list[str]] = Field(default_factory=dict)  # observer -> what it saw, in plain words
    traces: dict[str, list[float]] = Field(default_factory=dict)  # named series, such as a detector's scores
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    started: str = ""  # UTC, ISO 8601

    @property
    def worst_leakage(self) -> float | None:
        """The largest advantage over all attacks, or None where nothing attacked."""
        return max((leak.advantage for leak in self.leakage), default=None)


def trial_hash(config: dict[str, Json]) -> str:
    """Return the first 16 hex digits of SHA-256 over the canonical JSON of the full configuration."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
