"""Engines on vLLM: continuous batching, for GPU pods. Assumes vLLM 0.32 (``make vllm-env``).

A node is a prompt and the tokens of the response so far; vLLM's prefix cache keeps what was
computed for them. A prompt's image is processed once, ahead of the model, and goes to vLLM with its
first draw. Every draw is a request of its own, all run in the same loop and finish in any
order. Where a draw ends with its sentence, its text is read after every token, as in the engine on
transformers, and the request is then ended: stop strings would also stop at abbreviations, and
leave the token after the sentence in the response.

The policy is merged onto the local disk for as long as vLLM loads it. Adapters are not handed to
vLLM: after three rounds their ranks add up to more than it supports, and it would add them in
bfloat16 (`srccore.models.folding`).
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import EngineConfig
from srccore.errors import UserError
from srccore.method.engine import Continuation, Draw, Prompt, TokenDistribution, Work
from srccore.models.merged import save_merged
from srccore.models.policy import Policy, prompt_text
from srccore.models.rating import encode_rating_prompts, single_token
from srccore.models.writing import Vocabulary, Writer

__all__ = ["VllmRatingEngine", "VllmSamplingEngine"]

_QUEUE = 3
"""Draws that may be submitted, as a multiple of those that run. A search waits for the longest
sentence of its beams, and others fill the room that it leaves: of the rows of a forward pass, 61 %
were used with 1.5, 80 % with 2, 88 % with 3 and 89 % with 4 (``tiny``, 64 sequences)."""
_MAX_BANNED = 1024
"""The most tokens that vLLM bans in one request."""
_HOTTEST = 2
"""The highest temperature of vLLM."""


@dataclass(frozen=True)
class _Prepared:
    """A prompt as it goes to vLLM: the processed image, and the tokens with the image's places."""

    question: str
    key: str
    tokens: list[int]
    image: Any
    rest: dict[str, Any]
    """Where the image is in the tokens, and what identifies it."""


@dataclass(frozen=True, eq=False)
class _Node:
    """A prefix: the prompt, and the response's tokens so far."""

    prompt: _Prepared
    tokens: tuple[int, ...] = ()


class VllmSamplingEngine:
    """Continues responses of a vision-language model.

    Args:
        policy: The policy.
        device: ``cpu`` or ``cuda``.
        config: How vLLM is set up.
        draws: Draws that a prompt usually waits for at the same time.

    Raises:
        UserError: The policy cannot be loaded, or has more tokens that are not text than vLLM bans.
    """

    def __init__(self, policy: Policy, device: str, config: EngineConfig, draws: int) -> None:
        self.work = Work()
        self._queued = min(config.sequences, math.ceil(_QUEUE * config.sequences / draws))
        self._draws, self._longest_prompt = draws, 0
        self._config = config
        self._tickets = itertools.count()
        self._running: dict[str, tuple[_Node, Writer]] = {}
        self._without_room: list[tuple[int, Continuation]] = []
        _prepare_process(device)
        with tempfile.TemporaryDirectory(prefix="srccore-policy-") as folder:
            loaded = save_merged(policy, Path(folder))
            self._vocabulary = Vocabulary(loaded.model, loaded.processor)
            if len(self._vocabulary.banned) > _MAX_BANNED:
                raise UserError(
                    f"vLLM bans at most {_MAX_BANNED} tokens, and {len(self._vocabulary.banned)} "
                    f"of {policy.base.path} are not text.",
                    "Set engine.name to transformers.",
                )
            self._bans = dict.fromkeys(self._vocabulary.banned, -math.inf)
            self._ends = sorted(self._vocabulary.ends)
            longest = _longest(loaded.model.config)
            self._processor = loaded.processor
            del loaded  # Its weights are on the disk.
            self._engine = _open(folder, policy.base.dtype, device, config, longest)
            _use_images_of(self._engine, self._processor)
            self._engine.collective_rpc("count_images")
            cache = self._engine.vllm_config.cache_config
            self._cached_tokens: int = cache.num_gpu_blocks * cache.block_size
        # Its own: a tokenizer must not be used by two threads at a time.
        self._processor = copy.deepcopy(self._processor)

    @property
    def in_flight(self) -> int:
        """As many as fill the queue, if they leave half of the prefix cache to responses.

        A further draw whose prompt has been dropped from the cache would compute it again.
        """
        if self._draws == 1 or not self._longest_prompt:
            return self._queued
        return max(1, min(self._queued, self._cached_tokens // (2 * self._longest_prompt)))

    def prepare(self, prompts: Sequence[Prompt]) -> list[_Prepared]:
        """Decodes and processes images, and encodes texts."""
        return [self._prepared(prompt) for prompt in prompts]

    def _prepared(self, prompt: Prompt) -> _Prepared:
        text = prompt_text(self._processor, prompt.question)
        (request,) = self._engine.renderer.render_cmpl(
            [
                {
                    "prompt_token_ids": self._processor.tokenizer.encode(
                        text, add_special_tokens=False
                    ),
                    "multi_modal_data": {"image": prompt.image()},
                    "multi_modal_uuids": {"image": prompt.key},
                }
            ],
            # The cache of what vLLM's process has belongs to the thread that submits.
            skip_mm_cache=True,
        )
        tokens = request.pop("prompt_token_ids")
        (image,) = request.pop("mm_kwargs")["image"]
        return _Prepared(prompt.question, prompt.key, tokens, image, request)

    def open(self, prepared: Sequence[_Prepared]) -> list[_Node]:
        """Returns nodes; the first draw from one computes its prompt."""
        self.work.prompts += len(prepared)
        self._longest_prompt = max(self._longest_prompt, *(len(each.tokens) for each in prepared))
        return [_Node(each) for each in prepared]

    def submit(self, draws: Sequence[Draw]) -> list[int]:
        """Hands draws to vLLM, which starts as many as fit.

        Raises:
            UserError: A prompt leaves too little room for what is drawn.
        """
        tickets = []
        for draw in draws:
            node: _Node = draw.node
            ticket = next(self._tickets)
            tickets.append(ticket)
            request = self._request(node)
            length = len(request["prompt_token_ids"])
            room = self._engine.model_config.max_model_len - length
            self._check(draw, room)
            writer = Writer(self._vocabulary, node.tokens, draw.whole)
            if room < 1:
                # The response is as long as it can be.
                self._without_room.append((ticket, _continuation(node, writer)))
                continue
            self._engine.add_request(str(ticket), request, self._parameters(draw, room))
            self._running[str(ticket)] = (node, writer)
        return tickets

    def _request(self, node: _Node) -> dict[str, Any]:
        image = {"image": [node.prompt.image]}
        # Leaves the image out if vLLM's process has it already.
        self._engine.input_processor.inject_into_mm_cache(node.prompt.rest["mm_hashes"], image)
        tokens = [*node.prompt.tokens, *node.tokens]
        return {**node.prompt.rest, "prompt_token_ids": tokens, "mm_kwargs": image}

    def _check(self, draw: Draw, room: int) -> None:
        """Refuses what vLLM would refuse, or a prompt that leaves no room for a response."""
        limit = self._engine.model_config.max_model_len
        prompt = limit - room - len(draw.node.tokens)
        if prompt + draw.max_tokens > limit:
            raise UserError(
                f"The prompt {draw.node.prompt.question!r} takes {prompt} tokens with its image, "
                f"and up to {draw.max_tokens} may follow: more than the {limit} of vLLM's longest "
                "sequence.",
                "Raise engine.max_length if the model allows it, lower the limit of a response "
                "(search.max_sentence_tokens, evaluation.max_tokens), or leave the sample out.",
            )
        if draw.temperature > _HOTTEST:
            raise UserError(
                f"vLLM draws at temperatures up to {_HOTTEST}, not at {draw.temperature}.",
                "Lower search.temperature or annotation.temperature, or set search.engine.name to "
                "transformers.",
            )

    def _parameters(self, draw: Draw, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0 if draw.greedy else draw.temperature,
            # vLLM's are signed.
            seed=draw.seed % 2**63,
            max_tokens=min(draw.max_tokens, room),
            # Of the drawn token alone, and before bans and temperature.
            logprobs=0,
            flat_logprobs=True,
            logit_bias=self._bans,
            stop_token_ids=self._ends,
            detokenize=False,
            # A whole response ends at a token that vLLM sees; a sentence is looked for in the text.
            output_kind=RequestOutputKind.FINAL_ONLY if draw.whole else RequestOutputKind.DELTA,
            skip_clone=True,
        )

    def finished(self) -> list[tuple[int, Continuation]]:
        """Runs vLLM until a draw is finished."""
        found, self._without_room = self._without_room, []
        while self._running and not found:
            ended = []
            self.work.forward_passes += 1
            for output in self._engine.step():
                if output.request_id not in self._running:
                    continue  # What it drew after its end.
                node, writer = self._running[output.request_id]
                (drawn,) = output.outputs
                if not writer.count:
                    self.work.prefilled_tokens += _prefilled(output)
                for token, score in zip(drawn.token_ids, drawn.logprobs.logprobs, strict=True):
                    writer.write(token, score)
                if writer.stop is None and not output.finished:
                    continue
                if not output.finished:
                    ended.append(output.request_id)
                del self._running[output.request_id]
                self.work.decoded_tokens += writer.count
                found.append((int(output.request_id), _continuation(node, writer)))
            if ended:
                self._engine.abort_request(ended)
        if not self._running:
            # Not after every draw: vLLM's process answers between two steps.
            self.work.image_encodings += self._engine.collective_rpc("take_image_count")[0]
        return found

    def close(self) -> None:
        """Ends vLLM's processes and frees their GPUs."""
        self._engine.engine_core.shutdown()


def _continuation(node: _Node, writer: Writer) -> Continuation:
    return Continuation(
        text=writer.text,
        token_count=writer.count,
        log_probability=writer.log_probability,
        stop=writer.stop or "length",
        node=None if writer.stop == "end" else _Node(node.prompt, writer.tokens),
    )


class VllmRatingEngine:
    """Reads next-token distributions of a text-only causal language model, in float32.

    Prompts of one sample share their heads through vLLM's prefix cache.

    Args:
        folder: A checkpoint that train-scorer wrote.
        device: ``cpu`` or ``cuda``.
        config: How vLLM is set up.
    """

    def __init__(self, folder: Path, device: str, config: EngineConfig) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        longest = _longest(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        self._tickets = itertools.count()
        self.work = Work()
        _prepare_process(device)
        self._engine = _open(str(folder), "float32", device, config, longest)

    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        """Reads the distributions; a prompt is one request of one token.

        Raises:
            UserError: A prompt is too long.
        """
        from vllm import SamplingParams

        wanted = [single_token(self._tokenizer, token) for token in tokens]
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, logprob_token_ids=wanted, detokenize=False
        )
        limit = self._engine.model_config.max_model_len
        encoded = encode_rating_prompts(self._tokenizer, prompts)
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) >= limit:
                raise UserError(
                    f"A rating prompt takes {len(ids)} tokens, more than the {limit} of vLLM's "
                    f"longest sequence: {prompt[:100]!r}.",
                    "Raise engine.max_length if the model allows it.",
                )
        places: dict[str, int] = {}
        for place, ids in enumerate(encoded):
            ticket = str(next(self._tickets))
            places[ticket] = place
            (request,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": ids}])
            self._engine.add_request(ticket, request, parameters)
        results: dict[int, TokenDistribution] = {}
        self.work.prompts += len(prompts)
        while len(results) < len(prompts):
            self.work.forward_passes += 1
            for output in self._engine.step():
                self.work.prefilled_tokens += _prefilled(output)
                (scores,) = output.outputs[0].logprobs
                shares = [math.exp(scores[token].logprob) for token in wanted]
                mass = sum(shares)
                results[places[output.request_id]] = TokenDistribution(
                    tuple(share / mass for share in shares), mass
                )
        return [results[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Ends vLLM's processes and frees their GPUs."""
        self._engine.engine_core.shutdown()


class ImageCounter:
    """Counts the images that vLLM encodes; vLLM adds these methods to its workers.

    It encodes an image again if neither its prefix cache nor its cache of encoded images has it.
    """

    execute_model: Callable[[Any], Any]

    def count_images(self) -> None:
        """Counts from now on."""
        execute, self._encoded = self.execute_model, 0

        def counted(scheduled: Any) -> Any:
            self._encoded += sum(map(len, scheduled.scheduled_encoder_inputs.values()))
            return execute(scheduled)

        self.execute_model = counted

    def take_image_count(self) -> int:
        """Returns the number of images since the last call."""
        counted, self._encoded = self._encoded, 0
        return counted


def _prepare_process(device: str) -> None:
    """Sets what vLLM reads from the environment, before anything of it is imported."""
    if device == "cpu":
        # It compiles small functions, which takes a minute and saves nothing here.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    else:
        # R-Scorer, which is read in float32: TF32, as by the engine on transformers.
        os.environ.setdefault("VLLM_FLOAT32_MATMUL_PRECISION", "high")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A fork would take over locks of this process's threads.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # On a CPU it warns about every request.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if device == "cpu" else "WARNING")


def _open(folder: str, dtype: str, device: str, config: EngineConfig, longest: int) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    on_cpu = device == "cpu"
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            dtype=dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.memory_share,
            max_model_len=min(config.max_length, longest),
            max_num_seqs=config.sequences,
            limit_mm_per_prompt={"image": 1, "video": 0},
            # Sampling is what a draw says, whatever the checkpoint suggests.
            generation_config="vllm",
            disable_log_stats=True,
            enforce_eager=on_cpu,
            # A prompt that is computed in parts rewinds its random numbers, which fails on a CPU.
            enable_chunked_prefill=not on_cpu,
            # The prefix cache keeps whole blocks; a CPU's would have 128 tokens.
            block_size=32 if on_cpu else None,
            worker_extension_cls=f"{__name__}.{ImageCounter.__name__}",
        ),
        # The defaults for work without a client that waits: more tokens in a step.
        usage_context=UsageContext.LLM_CLASS,
    )


def _prefilled(output: Any) -> int:
    """The tokens of a request's prompt that were not in the prefix cache."""
    return len(output.prompt_token_ids) - (output.num_cached_tokens or 0)


def _longest(config: Any) -> int:
    """The longest sequence that a model's positions allow."""
    return int(config.get_text_config().max_position_embeddings)


def _use_images_of(engine: Any, processor: Any) -> None:
    """Makes vLLM see the pixels of training: it would process images with torchvision."""
    theirs = engine.renderer.get_mm_processor().info.get_hf_processor()
    theirs.image_processor = processor.image_processor
    # It would keep every image that was processed, up to 4 GiB.
    engine.renderer._mm_processor_only_cache = None
