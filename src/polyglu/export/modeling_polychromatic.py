"""PolychromaticLM for transformers. Deterministic, in training too: no Gumbel noise, the routing temperature is fixed.

Padding is invisible to attention and to routing: positions and routing means count what ``attention_mask`` shows. Rows
are not packed; ``position_ids`` only rotate. A cache keeps, beside keys and values, the routing input's running sums,
so it can be reordered, repeated and cropped. Under ``document`` and ``sequence`` scope each token changes the routing
of all positions: then nothing is cached, and ``generate`` runs the whole row for each token.

Shapes: B rows, T new positions, P = past + T positions, D d_model, K activations, R width of the router.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from polyglu.export.configuration_polychromatic import PolychromaticConfig
from polyglu.model.layers import GLU, AttentionHeads, RMSNorm, RoutedGLU, reference_mixture, rotary_tables


class RoutedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, and the running sum of its routing input at each position: fp32 ``[B, P, R]``."""

    totals: Tensor | None = None

    def add(self, projected: Tensor) -> Tensor:
        """Append positions ``[B, T, R]``; their running sums, ``[B, T, R]``."""
        new = projected.cumsum(1)
        if self.totals is None:
            self.totals = new
        else:
            new = new + self.totals[:, -1:]
            self.totals = torch.cat((self.totals, new), dim=1)
        return new

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.totals = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; their number is given as a negative one."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.totals is not None:
            self.totals = self.totals[:, :tokens_to_remove] if self.get_seq_length() else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take each row from another one."""
        super().reorder_cache(beam_idx)
        if self.totals is not None:
            self.totals = self.totals.index_select(0, beam_idx.to(self.totals.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.totals is not None:
            self.totals = self.totals.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        if self.totals is not None:
            self.totals = self.totals[indices]


def with_routing(cache: Cache, n_layers: int) -> Cache:
    """Let an empty dynamic cache keep routing sums as well; changed in place.

    Raises:
        ValueError: another kind of cache, or one that another model has filled.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{type(cache).__name__} keeps no routing sums; this model needs a DynamicCache")
    for index in range(n_layers):
        if index == len(cache.layers):
            cache.layers.append(RoutedCacheLayer())
        elif not isinstance(cache.layers[index], RoutedCacheLayer):
            if type(cache.layers[index]) is not DynamicLayer or cache.layers[index].get_seq_length():
                raise ValueError("past_key_values holds positions without routing sums; begin with an empty cache")
            cache.layers[index] = RoutedCacheLayer()
    return cache


class PolychromaticAttention(AttentionHeads):
    """Causal grouped-query attention with QK-norm, by any of transformers' attention functions."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__(config.d_model, config.n_q_heads, config.n_kv_heads, config.head_dim, config.eps)
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.n_q_heads // config.n_kv_heads

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` -> ``[B, T, D]``, and the weights ``[B, H, T, P]`` if the function makes them."""
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x, rope))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.o_proj(out.flatten(2)), weights


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as it is written, with its weights ``[B, H, T, P]``; the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class PolychromaticMLP(RoutedGLU):
    """Routed feed-forward layer over rows that may be padded."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__(config.d_model, config.d_ff, config.n_activations, config.routing)
        self.causal, self.tau, self.layer_idx = config.routing_scope == "causal", config.tau, layer_idx

    def forward(self, x: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``; ``seen`` says which of ``[B, P]`` positions are no padding."""
        new = seen[:, -x.shape[1] :, None]
        projected = self.router.project(x).masked_fill(~new, 0.0)
        if self.causal:
            layer = RoutedCacheLayer() if cache is None else cache.layers[self.layer_idx]
            total, count = layer.add(projected), seen.cumsum(1)[:, -x.shape[1] :, None]
        else:
            total, count = projected.sum(1, keepdim=True), seen.sum(1)[:, None, None]
        token_logits = self.logits_of(total / count.clamp(min=1))  # [B, T or 1, K]
        mixed = reference_mixture(self.gate_proj(x), self.alpha.float()[None], token_logits, self.tau)
        return self.down_proj(mixed * self.up_proj(x))  # type: ignore[no-any-return]


class PolychromaticDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: PolychromaticConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.eps)
        self.self_attn = PolychromaticAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.eps)
        routed = config.ffn == "polyglu"
        self.mlp = PolychromaticMLP(config, layer_idx) if routed else GLU(config.d_model, config.d_ff, config.ffn)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any, seen: Tensor, past_key_values: Cache | None = None
    ) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past_key_values)[0]
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, GLU):
            return x + self.mlp(normed)  # type: ignore[no-any-return]
        return x + self.mlp(normed, seen, past_key_values)  # type: ignore[no-any-return]


class PolychromaticPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers wants to know."""

    config: PolychromaticConfig
    config_class = PolychromaticConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("PolychromaticDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("alpha", "beta", "router.out")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012  # as transformers declares it
        "hidden_states": PolychromaticDecoderLayer,
        "attentions": PolychromaticAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RoutedGLU):
            init.zeros_(module.alpha)
            init.ones_(module.beta)
        for name, projection in module.named_children():
            if name in ("o_proj", "down_proj"):
                init.normal_(projection.weight, std=self.config.initializer_range * (2 * self.config.n_layers) ** -0.5)


class PolychromaticModel(PolychromaticPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: PolychromaticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(PolychromaticDecoderLayer(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normalised features ``[B, T, D]`` of tokens ``[B, T]`` or their embeddings ``[B, T, D]``.

        Raises:
            ValueError: both or neither of tokens and embeddings, a mask that is not ``[B, P]``, or a cache that cannot
                be exact.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = bool(use_cache) and self.config.decodes_with_cache
        if past_key_values is not None and not self.config.decodes_with_cache:
            raise ValueError(f"routing scope '{self.config.routing_scope}' has no exact cache; pass use_cache=False")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None:
            past_key_values = with_routing(past_key_values, self.config.n_layers)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        seen = self._seen(x, past, attention_mask)
        if position_ids is None:
            position_ids = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = create_causal_mask(self.config, x, None if seen.all() else seen, past_key_values)
        rope = tuple(table.unsqueeze(-2) for table in rotary_tables(position_ids, self.config.head_dim))
        for layer in self.layers:
            x = layer(x, rope, mask, seen, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )

    @staticmethod
    def _seen(x: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
        """Which positions are no padding: bool ``[B, P]``."""
        shape = x.shape[0], past + x.shape[1]
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=x.device)
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask must be {list(shape)}, rows and positions; got {[*attention_mask.shape]}")
        return attention_mask.bool()


class PolychromaticForCausalLM(PolychromaticPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model; its head is tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as transformers declares it

    def __init__(self, config: PolychromaticConfig) -> None:
        super().__init__(config)
        self.model = PolychromaticModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``, of the last ``logits_to_keep`` positions if that is not 0; the loss, given labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; without a cache where a cache could not be exact, whatever ``use_cache`` says."""
        if not self.config.decodes_with_cache:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)
