"""The model as lm-eval's harness sees it. Deterministic: no routing noise, the checkpoint's temperature, fp32.

requests ──► token ids ──► known already? no ──► packed, never padded ──► kept as they come ──► in the requests' order
                              yes ──────────────────────────────────────────────┘
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs

from polyglu.data.chat import render_prompt
from polyglu.data.stopping import cut_at, stop_rule
from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError
from polyglu.evaluation.answers import Answers, Asker, Question
from polyglu.evaluation.progress import progress
from polyglu.evaluation.scoring import NOBODY, Request, rolling_requests, score
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import generate_rows

GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

logger = logging.getLogger(__name__)


class GenerationSettings(NamedTuple):
    """How an answer is made."""

    until: tuple[str, ...]
    """Stop strings."""
    max_gen_toks: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, task_settings: dict[str, Any], max_gen_toks: int) -> "GenerationSettings":
        """Of a task's ``generation_kwargs``; what a greedy answer does not depend on is left out.

        Raises:
            PolygluError: an unknown key, or no room for an answer.
        """
        settings = dict(normalize_gen_kwargs(task_settings, max_gen_toks))
        unknown = settings.keys() - GENERATION_KEYS
        if unknown:
            raise PolygluError(
                f"generation_kwargs '{min(unknown)}' is not supported; known are {', '.join(sorted(GENERATION_KEYS))}."
            )
        if settings["max_gen_toks"] < 1:
            raise PolygluError(f"max_gen_toks is {settings['max_gen_toks']}; a task that generates needs at least 1.")
        until = tuple(stop for stop in settings["until"] if stop)
        drawn = settings["do_sample"] and settings.get("temperature", 0.0) > 0
        how = {key: settings[key] for key in ("temperature", "top_k", "top_p") if drawn and key in settings}
        return cls(until, settings["max_gen_toks"], **how)


class Prompt(NamedTuple):
    """What is to be continued."""

    ids: list[int]
    settings: GenerationSettings
    question: Question

    @property
    def seed(self) -> int:
        """Of its draws: whatever else is asked and has been answered, an answer is drawn from the same numbers."""
        return int(hashlib.sha256(self.question.key.encode()).hexdigest()[:15], 16)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests with a PolychromaticLM.

    What does not fit into the model's ``seq_length`` is cut from the left of the prompt, counted and logged. To
    generate, a prompt may fill what ``max_gen_toks`` leaves of it, but at least half of it.

    Args:
        model: as ``open_for_inference`` gives it.
        tokenizer: its tokenizer.
        tau: routing temperature, the checkpoint's.
        batch_size: inputs or prompts that run together; as many as fit if absent. Results do not depend on it.
        chat: prompts are conversations: the chat format's special tokens in them are those tokens.
        seed: of answers that are drawn.
        answers: where answers are taken from, and kept as they come.
        versions: of the tasks, by name.

    Attributes:
        cut: for each task, how many of its prompts were cut so far.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: PolychromaticLM,
        tokenizer: Tokenizer,
        tau: float,
        batch_size: int | None = None,
        chat: bool = False,
        *,
        seed: int = 0,
        answers: Answers | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if chat and (tokenizer.im_start_id is None or tokenizer.im_end_id is None):
            raise PolygluError(
                f"tokenizer '{tokenizer.name}' has no <|im_start|> and <|im_end|>; leave --apply-chat-template out."
            )
        self._model, self._text, self._tau = model, tokenizer, tau
        self._batch_size, self._chat, self._seed = batch_size, chat, seed
        self._answers, self._versions = answers or Answers(), versions or {}
        self.cut: Counter[str] = Counter()

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

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the likeliest at each token."""
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, askers=self._askers(requests))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both together; where a merge swallows the border, the last token is what is scored."""
        if not context:
            context_ids, continuation_ids = [], self.tok_encode(continuation)
        else:
            context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            *context_ids, last = self.tok_encode(context + continuation) or [self.prefix_token_id]
            continuation_ids = [last]
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        askers: Sequence[Asker] | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise PolygluError(
                    f"a continuation has {len(continuation)} tokens, the model's seq_length is {self.max_length}; "
                    "this task needs a model with a longer one."
                )
        askers = askers or [NOBODY] * len(requests)
        pairs = [(context, continuation, self.max_length) for _, context, continuation in requests]
        too_long = [len(context) + len(continuation) > longest + 1 for context, continuation, longest in pairs]
        self._report_cut(list(compress(askers, too_long)), len(requests))
        packed = [Request.of(*pair, asker) for pair, asker in zip(pairs, askers, strict=True)]
        return [tuple(found) for found in self._score(packed, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of ``max_length`` where it is longer."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            rolling_requests(ids, self.eot_token_id, self.max_length, asker)
            for ids, asker in zip(texts, self._askers(requests), strict=True)
        ]
        flat = [window for windows_of_text in windows for window in windows_of_text]
        scores = iter(self._score(flat, "rolling log-likelihoods"))
        return [sum(next(scores).log_likelihood for _ in windows_of_text) for windows_of_text in windows]

    def _score(self, requests: Sequence[Request], description: str) -> list[Any]:
        return score(
            self._model,
            requests,
            self._tau,
            description=description,
            max_rows=self._batch_size,
            answers=self._answers,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt until a stop string, an end token, or ``max_gen_toks`` tokens (256 by default).

        Prompts that are continued alike share the cache: where one ends, the next begins.
        """
        prompts = [*self._prompts(requests)]
        known = self._answers.known([prompt.question for prompt in prompts], "generation")
        keys = [prompt.question.key for prompt in prompts]
        found: dict[str, str] = {key: answer for key, answer in zip(keys, known, strict=True) if answer is not None}
        left = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        collator = Collator(
            [*left.values()],
            sort_fn=lambda prompt: (-len(prompt.ids), prompt.ids),
            group_by="gen_kwargs",
            group_fn=lambda prompt: prompt.settings,
        )
        with progress("generating", len(left)) as advance:
            for group in collator.get_batched(n=0):  # all that have the same settings
                for prompt, answer in self._continue(group):
                    self._answers.add([(prompt.question, answer)])
                    found[prompt.question.key] = answer
                    advance(1)
        return [found[key] for key in keys]

    def _prompts(self, requests: Sequence[Instance]) -> Iterator[Prompt]:
        """Token ids of each request, with what its answer depends on."""
        asked: Counter[str] = Counter()
        cut = []
        for request, asker in zip(requests, self._askers(requests), strict=True):
            text, settings = request.args[0], GenerationSettings.of(request.args[1], self.max_gen_toks)
            room = max(self.max_length - settings.max_gen_toks, self.max_length // 2, 1)
            ids = self.tok_encode(text) or [self.prefix_token_id]
            cut += [asker] * (len(ids) > room)
            content = {"prompt_ids": ids[-room:], **settings._asdict()}
            if settings.temperature > 0:  # asked again, an answer is drawn anew
                asked.update([key := Question(asker, content).key])
                content |= {"seed": self._seed, "draw": asked[key]}
            yield Prompt(ids[-room:], settings, Question(asker, content))
        self._report_cut(cut, len(requests))

    def _continue(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, str]]:
        """Answers to prompts with the same settings, as they come."""
        settings = prompts[0].settings
        events = generate_rows(
            self._model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=settings.max_gen_toks,
            tau=self._tau,
            eos_ids=self._text.end_ids,
            stop=stop_rule(self._text, settings.until),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=[prompt.seed for prompt in prompts],
            max_rows=self._batch_size,
        )
        new: list[list[int]] = [[] for _ in prompts]
        for row, token in events:
            if token is not None:
                new[row].append(token)
            else:
                yield prompts[row], cut_at(self._text.decode(new[row]), settings.until)

    def _askers(self, requests: Sequence[Instance]) -> list[Asker]:
        names = [request.task_name or "" for request in requests]
        versions = [self._versions.get(name, "") for name in names]
        return [Asker(*one) for one in zip(names, versions, (request.doc_id for request in requests), strict=True)]

    def _report_cut(self, cut: Sequence[Asker], total: int) -> None:
        self.cut.update(asker.task for asker in cut)
        if cut:
            message = "%d of %d prompts were cut on the left to fit into %d tokens"
            logger.warning(message, len(cut), total, self.max_length)
