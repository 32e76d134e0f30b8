"""Plain words for what torch says where an input or a label does not fit."""

from torch import Tensor

__all__ = ["MISFITS", "Refused", "why_no_loss", "why_no_output"]

MISFITS = (RuntimeError, ValueError, IndexError)  # what torch raises for a tensor that does not fit


class Refused(ValueError):  # noqa: N818 - what happened, not whose fault it is
    """An error that says itself what was expected and what came; nothing is put before it."""


def why_no_output(x: Tensor, error: Exception) -> str:
    """Return what was wrong with the input that made torch raise ``error``, and the fix."""
    text = _one_line(error)
    if "more than 1 value per channel" in text:
        return f"expected more than one sample, got a batch of {len(x)}; batch norm needs more: drop_last=True ({text})"
    if "index out of range" in text and not x.is_floating_point() and x.numel():
        return (
            f"expected tokens that the embedding holds, got {int(x.min())} to {int(x.max())}; "
            f"match the embedding to the vocabulary ({text})"
        )
    if "in-place" in text:
        return f"expected a stage that leaves what it receives as it is; set inplace=False in its first layers ({text})"
    return (
        f"its stage does not fit an input of shape {tuple(x.shape)} and type {x.dtype} ({text}); "
        "cut one model for all parties, and send what the stage below puts out"
    )


def why_no_loss(output: Tensor, y: Tensor, error: Exception) -> str:
    """Return what was wrong with the labels that made torch raise ``error``, and the fix."""
    text = _one_line(error)
    if "out of bounds" in text and y.numel():
        classes = output.shape[min(1, output.ndim - 1)]
        return (
            f"expected labels from 0 to {classes - 1}, got {y.min().item()} to {y.max().item()}; "
            f"match the last layer's width to the number of classes ({text})"
        )
    return (
        f"its loss takes no outputs of shape {tuple(output.shape)} with labels of shape {tuple(y.shape)} and type "
        f"{y.dtype} ({text}); send one label a sample, of the type that the loss expects"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
