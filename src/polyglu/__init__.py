"""PolyGLU: language models whose feed-forward neurons choose among activation functions (arXiv 2603.13347).

>>> from polyglu import PolyGLU
>>> ffn = PolyGLU(d_model=512, d_ff=2048)  # a drop-in feed-forward layer: [B, T, D] -> [B, T, D]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyglu.model.architecture import PolychromaticLM
    from polyglu.model.config import ModelConfig
    from polyglu.model.feed_forward import PolyGLU
    from polyglu.model.layers import GLU
    from polyglu.model.model import create_model, load_checkpoint

__version__ = "0.1.0"
__all__ = ["GLU", "ModelConfig", "PolyGLU", "PolychromaticLM", "create_model", "load_checkpoint"]

_HOME = {
    "GLU": "layers",
    "ModelConfig": "config",
    "PolyGLU": "feed_forward",
    "PolychromaticLM": "architecture",
    "create_model": "model",
    "load_checkpoint": "model",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for: ``polyglu --help`` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'polyglu' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"polyglu.model.{_HOME[name]}"), name)
