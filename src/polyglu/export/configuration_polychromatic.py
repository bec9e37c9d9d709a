"""Configuration of PolychromaticLM for transformers."""

from typing import Any

from transformers import PreTrainedConfig


class PolychromaticConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape and routing of a model; transformers' names for the fields are known too (``attribute_map``).

    vocab_size, d_model, d_ff, n_layers, n_q_heads, n_kv_heads, head_dim, seq_length, n_activations, eps: its shape.
    ffn: ``polyglu``, whose neurons choose among activations, or a gated linear unit with one activation.
    routing_scope: what the routing input is a mean of: ``causal`` (the tokens so far), ``document``, ``sequence``.
    routing: ``both``, or what neurons choose by alone: ``static`` (their preference) or ``dynamic`` (what they read).
    tau: routing temperature.
    """

    model_type = "polychromatic"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  # as transformers declares it
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_q_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "eps",
    }

    vocab_size: int = 151669
    d_model: int = 1024
    d_ff: int = 4096
    n_layers: int = 28
    n_q_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 64
    seq_length: int = 4096
    n_activations: int = 4
    eps: float = 1e-6
    routing_scope: str = "sequence"
    ffn: str = "polyglu"
    routing: str = "both"
    use_flash_attn: bool = True
    tau: float = 1.0
    step: int = 0
    tokenizer: dict[str, Any] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def pools(self) -> bool:
        """Whether neurons choose by a mean of what is read."""
        return self.ffn == "polyglu" and self.routing != "static"

    @property
    def decodes_with_cache(self) -> bool:
        """Whether a new token leaves the positions before it as they are."""
        return not self.pools or self.routing_scope == "causal"
