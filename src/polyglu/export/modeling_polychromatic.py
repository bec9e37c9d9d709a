"""PolychromaticLM for transformers. Deterministic, in training too: no Gumbel noise, the routing temperature is fixed.

Padding is invisible to attention and to routing: positions and routing means count what ``attention_mask`` shows. Rows
are not packed; ``position_ids`` only rotate. A cache keeps, beside keys and values, the running sums of the routing
input and of the positions that count, so it can be reordered, repeated and cropped. Under ``document`` and ``sequence``
scope each token changes the routing of all positions: then nothing is cached, and ``generate`` runs the whole row for
each token.

Shapes: B rows, T new positions, P = past + T positions, D d_model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from polyglu.export.cache_polychromatic import with_routing
from polyglu.export.configuration_polychromatic import PolychromaticConfig
from polyglu.export.layers_polychromatic import PolychromaticAttention, PolychromaticDecoderLayer
from polyglu.model.layers import RMSNorm, RoutedGLU, rotary_tables


class PolychromaticPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers wants to know."""

    config: PolychromaticConfig
    config_class = PolychromaticConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("PolychromaticDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012  # as transformers declares it
        "hidden_states": PolychromaticDecoderLayer,
        "attentions": PolychromaticAttention,
    }

    def __init__(self, config: PolychromaticConfig) -> None:
        super().__init__(config)
        kept = {"both": ("alpha", "beta", "router.out"), "static": ("alpha",), "dynamic": ("beta", "router.out")}
        self._keep_in_fp32_modules_strict = kept[config.routing] if config.ffn == "polyglu" else ()

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
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normalised features ``[B, T, D]`` of tokens ``[B, T]`` or their embeddings ``[B, T, D]``.

        Raises:
            ValueError: both or neither of tokens and embeddings, a mask that is not ``[B, P]``, packed rows, or a cache
                that cannot be exact.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = bool(use_cache) and self.config.decodes_with_cache
        if past_key_values is not None and not self.config.decodes_with_cache:
            raise ValueError(f"routing scope '{self.config.routing_scope}' has no exact cache; pass no past_key_values")
        if past_key_values is None and attention_mask is None and position_ids is not None:
            refuse_packed(position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None and self.config.pools:
            past_key_values = with_routing(past_key_values, self.config.n_layers)
        if isinstance(attention_mask, dict):  # made before the call
            masks = attention_mask
        else:
            masks = make_masks(self.config, x, attention_mask, past_key_values)
        places = masks["positions"] if position_ids is None else position_ids
        rope = tuple(table.unsqueeze(-2) for table in rotary_tables(places, self.config.head_dim))
        for layer in self.layers:
            x = layer(x, rope, masks["attention"], masks["seen"], past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )


def make_masks(
    config: PolychromaticConfig, x: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """What follows from ``attention_mask`` ``[B, P]`` for the new positions ``[B, T, D]``.

    Returns:
        ``attention``: the mask that the attention function takes; ``seen``: which positions are no padding ``[B, T]``,
        absent if all are; ``positions``: their places in their rows, padding not counted ``[B or 1, T]``.

    Raises:
        ValueError: a mask of another shape.
    """
    past = 0 if cache is None else cache.get_seq_length()
    new = slice(-x.shape[1], None)
    if attention_mask is None:
        seen, places = None, (torch.arange(x.shape[1], device=x.device) + past)[None]
    else:
        shape = [x.shape[0], past + x.shape[1]]
        # The length of a static cache is a tensor, for which a compiled step does not wait.
        if isinstance(past, int) and [*attention_mask.shape] != shape:
            raise ValueError(f"attention_mask must be {shape}, rows and positions; got {[*attention_mask.shape]}")
        seen, places = attention_mask[:, new].bool(), (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, new]
    return {"attention": create_causal_mask(config, x, attention_mask, cache), "seen": seen, "positions": places}


def refuse_packed(position_ids: Tensor) -> None:
    """Tell documents packed into a row from the positions, as transformers does; attention would cross their borders.

    Raises:
        ValueError: positions ``[B, T]`` begin again within a row.
    """
    if not torch.compiler.is_compiling() and (position_ids.diff(dim=-1) <= 0).any():
        raise ValueError("position_ids begin again within a row; this model takes one document a row, not packed ones")


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
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``, or those to keep (the last ones, or by index); the loss, given labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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
        """As in transformers; without a cache where a cache could not be exact, whatever ``use_cache`` says.

        Raises:
            ValueError: ``inputs_embeds``, which transformers continues with a cache alone, where there is none.
        """
        if not self.config.decodes_with_cache:
            if kwargs.get("inputs_embeds") is not None:
                scope = self.config.routing_scope
                raise ValueError(
                    f"inputs_embeds need a cache, and routing scope '{scope}' has no exact one; give input_ids"
                )
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: PolychromaticConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **_: Any,
    ) -> dict[str, Any]:
        """Masks of a step with a static cache, which ``generate`` makes before it calls the compiled model."""
        return make_masks(config, inputs_embeds, attention_mask, past_key_values)
