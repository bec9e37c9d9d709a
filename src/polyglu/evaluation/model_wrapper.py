"""The model as lm-eval's harness sees it. Deterministic: no routing noise, the checkpoint's temperature, fp32.

requests ──► token ids ──► sorted by length ──► packed batches, no padding ──► answers in the requests' order
"""

import logging
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs

from polyglu.data.chat import render_prompt
from polyglu.data.stopping import cut_at, stop_rule
from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError
from polyglu.evaluation.progress import tracked
from polyglu.evaluation.scoring import Request, rolling_requests, score
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import generate

GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

logger = logging.getLogger(__name__)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests with a PolychromaticLM.

    What does not fit into the model's ``seq_length`` is cut from the left of the prompt, counted and logged. To
    generate, a prompt may fill what ``max_gen_toks`` leaves of it, but at least half of it.

    Args:
        model: as ``open_for_inference`` gives it.
        tokenizer: its tokenizer.
        tau: routing temperature, the checkpoint's.
        batch_size: requests that run together; results do not depend on it.
        chat: prompts are conversations: the chat format's special tokens in them are those tokens.
    """

    max_gen_toks = 256

    def __init__(
        self, model: PolychromaticLM, tokenizer: Tokenizer, tau: float, batch_size: int = 8, chat: bool = False
    ) -> None:
        super().__init__()
        if chat and (tokenizer.im_start_id is None or tokenizer.im_end_id is None):
            raise PolygluError(
                f"tokenizer '{tokenizer.name}' has no <|im_start|> and <|im_end|>; leave --apply-chat-template out."
            )
        self._model, self._text, self._tau = model, tokenizer, tau
        self._batch_size, self._chat = batch_size, chat
        self._end_ids = [end for end in (tokenizer.eos_id, tokenizer.im_end_id) if end is not None]

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document, and stands before its first one."""
        return self._text.eos_id

    @property
    def max_length(self) -> int:
        """Longest input, in tokens."""
        return self._model.config.seq_length

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests, if it is told to."""
        return self._text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; nothing is added at either end."""
        return self._text.encode(string, allow_special=self._chat)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Conversation in the chat format, up to where the assistant answers.

        Raises:
            PolygluError: the assistant's turn is to be continued instead, which the format does not offer.
        """
        if not add_generation_prompt:
            raise PolygluError(
                "a task that begins the assistant's answer (gen_prefix) needs --apply-chat-template off."
            )
        return render_prompt(chat_history)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both together; where a merge swallows the border, the last token is what is scored."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            *context_ids, last = self.tok_encode(context + continuation)
            continuation_ids = [last]
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = 0
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise PolygluError(
                    f"a continuation has {len(continuation)} tokens, the model's seq_length is {self.max_length}; "
                    "this task needs a model with a longer one."
                )
            cut += len(context) + len(continuation) > self.max_length + 1
        self._report_cut(cut, len(requests))
        packed = [Request.of(context, continuation, self.max_length) for _, context, continuation in requests]
        return [*score(self._model, packed, self._tau, description="log-likelihoods", max_rows=self._batch_size)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of ``max_length`` where it is longer."""
        windows = [
            rolling_requests(self.tok_encode(request.args[0]), self.eot_token_id, self.max_length)
            for request in requests
        ]
        flat = [window for windows_of_text in windows for window in windows_of_text]
        scores = iter(
            score(self._model, flat, self._tau, description="rolling log-likelihoods", max_rows=self._batch_size)
        )
        return [sum(next(scores).log_likelihood for _ in windows_of_text) for windows_of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt until a stop string, an end token, or ``max_gen_toks`` tokens (256 by default)."""
        prompts = [(self.tok_encode(context), settings) for context, settings in (request.args for request in requests)]
        collator = Collator(
            prompts,
            sort_fn=lambda prompt: (-len(prompt[0]), prompt[0]),
            group_by="gen_kwargs",
            group_fn=lambda prompt: prompt[1],
        )
        answers: list[str] = []
        cut = 0
        for batch in tracked(list(collator.get_batched(n=self._batch_size)), "generating"):
            settings = _generation_settings(batch[0][1], self.max_gen_toks)
            room = max(self.max_length - settings["max_gen_toks"], self.max_length // 2, 1)
            cut += sum(len(prompt) > room for prompt, _ in batch)
            new = generate(
                self._model,
                [prompt[-room:] or [self.prefix_token_id] for prompt, _ in batch],
                max_new_tokens=settings["max_gen_toks"],
                tau=self._tau,
                eos_ids=self._end_ids,
                stop=stop_rule(self._text, settings["until"]),
                temperature=settings["temperature"] if settings["do_sample"] else 0.0,
                top_p=settings["top_p"],
                seed=len(answers),  # the sorted order is the same for any batch size, and so are the draws
            )
            answers += [cut_at(self._text.decode(ids), settings["until"]) for ids in new]
        self._report_cut(cut, len(requests))
        return list(collator.get_original(answers))

    def _report_cut(self, cut: int, total: int) -> None:
        if cut:
            logger.warning("%d of %d prompts were cut on the left to fit into %d tokens", cut, total, self.max_length)


def _generation_settings(task_settings: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    settings = dict(normalize_gen_kwargs(task_settings, max_gen_toks))
    unknown = settings.keys() - GENERATION_KEYS
    if unknown:
        raise PolygluError(
            f"generation_kwargs '{min(unknown)}' is not supported; known are {', '.join(sorted(GENERATION_KEYS))}."
        )
    if settings["max_gen_toks"] < 1:
        raise PolygluError(f"max_gen_toks is {settings['max_gen_toks']}; a task that generates needs at least 1.")
    settings["until"] = [stop for stop in settings["until"] if stop]
    return {"temperature": 0.0, "top_p": 1.0, **settings}
