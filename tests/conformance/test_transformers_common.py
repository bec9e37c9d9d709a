"""transformers' own common tests of causal language models pass on exported models.

None is left out here. They skip by themselves what needs an accelerator, FlashAttention or MPS, and what a model of
this kind has not: parts for images, experts, a sliding window, scaled rotary positions, a tensor-parallel plan.
"""

import unittest
from typing import Any
from unittest.mock import patch

import pytest
import torch
from foreign import foreign_tests

from polyglu.export.configuration_polychromatic import PolychromaticConfig
from polyglu.export.modeling_polychromatic import PolychromaticForCausalLM, PolychromaticModel

common, configuration, training = foreign_tests(
    "test_modeling_common", "test_configuration_common", "test_training_mixin"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

NAMES = {
    "MODEL_MAPPING_NAMES": PolychromaticModel.__name__,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": PolychromaticForCausalLM.__name__,
}
"""Tables in which their tests look up what a class is for -> our class in it."""


class ModelUnderTest:
    """What their tests ask about a model: its shape, a small config, inputs."""

    config_class = PolychromaticConfig
    base_model_class, causal_lm_class = PolychromaticModel, PolychromaticForCausalLM
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def get_config(self) -> PolychromaticConfig:
        shape = {"vocab_size": self.vocab_size, "d_model": self.hidden_size, "d_ff": 37, "n_layers": 2, "n_q_heads": 4}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return PolychromaticConfig(**shape, n_kv_heads=2, head_dim=8, seq_length=64, tau=0.5, **ids, **self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PolychromaticConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class CommonTests(common.ModelTesterMixin, training.TrainingTesterMixin):
    """Their tests of a class of models; in a subclass, of ours with some settings."""

    settings: dict[str, Any]
    all_model_classes = (PolychromaticModel, PolychromaticForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True
    _torch_compile_train_cls = PolychromaticForCausalLM
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = ModelUnderTest(self.settings)
        for table, name in NAMES.items():
            self.enterContext(patch.dict(getattr(common, table), {PolychromaticConfig.model_type: name}))
        known = {PolychromaticConfig: PolychromaticModel}
        self.enterContext(patch.dict(common.MODEL_MAPPING._extra_content, known))

    def test_config(self) -> None:
        configuration.ConfigTester(self, PolychromaticConfig, d_model=37, **self.settings).run_common_tests()


class TestCausal(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    settings = {"routing_scope": "causal"}


class TestDocument(CommonTests, unittest.TestCase):
    """Without their tests of ``generate``, which look into its cache: this scope has none."""

    settings = {"routing_scope": "document"}
    all_generative_model_classes = ()


class TestWithoutRouting(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    settings = {"ffn": "swiglu"}
