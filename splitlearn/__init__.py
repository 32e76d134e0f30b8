"""Split learning: cut a model into stages, let parties hold them, and see exactly what crosses between them."""

from splitlearn.checkpoint import load_checkpoint, save_checkpoint
from splitlearn.codecs import Ans, ErrorFeedback, Float16, Int8, Palette, PerKind, RandomK, TopK, Uniform, Zstd
from splitlearn.cut import cut, join
from splitlearn.features import Features
from splitlearn.federation import (
    Member,
    RemoteMember,
    apart_round,
    batch_norm_entries,
    fedavg_round,
    in_turn_round,
    mean,
    parallel_round,
    sample,
    splitfed_v1_round,
    splitfed_v2_round,
    splitfed_v3_round,
)
from splitlearn.frames import Kind, Message, decode, encode
from splitlearn.inference import infer
from splitlearn.network import Emulated
from splitlearn.party import Guard, Guards, Learner, Party
from splitlearn.protocols import Joined, concatenated, parallel, summed, u_shaped, vanilla, vertical
from splitlearn.recut import recut
from splitlearn.remote import Remote, wire
from splitlearn.service import Service
from splitlearn.threat import Encoder, Grants, Threat, View, granted, observe
from splitlearn.train import Batches, epochs_of, evaluate, fit, predict
from splitlearn.wire import Framed, Metered, Recorded, Transport, serve

__version__ = "0.1.0"

__all__ = [
    "Ans", "Batches", "Emulated", "Encoder", "ErrorFeedback", "Features", "Float16", "Framed", "Grants", "Guard",
    "Guards", "Int8", "Joined", "Kind", "Learner", "Member", "Message", "Metered", "Palette", "Party", "PerKind",
    "RandomK", "Recorded", "Remote", "RemoteMember", "Service", "Threat", "TopK", "Transport", "Uniform", "View",
    "Zstd", "apart_round", "batch_norm_entries", "concatenated", "cut", "decode", "encode", "epochs_of", "evaluate",
    "fedavg_round", "fit", "granted", "in_turn_round", "infer", "join", "load_checkpoint", "mean", "observe",
    "parallel", "parallel_round", "predict", "recut", "sample", "save_checkpoint", "serve", "splitfed_v1_round",
    "splitfed_v2_round", "splitfed_v3_round", "summed", "u_shaped", "vanilla", "vertical", "wire",
]  # fmt: skip
