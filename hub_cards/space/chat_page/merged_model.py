"""A merged model that answers: loaded once, asked by many at a time.

Enters: a folder or an id of the Hub; chats. Leaves: prompts, with the route of every token; answers, piece by piece.
Invariant: nothing of one asking is kept on the object, so askings that run at once cannot mix.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .chats import Refused, Span, spans, without_folders

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO, PARAMETERS = "auto", ("base", "merged")
GENERATES = "generates an answer"  # the name of the threads that do


@dataclass(frozen=True)
class Prompt:
    """What the model reads: its tensors, the spans of the tokens, and the route that the answer will take."""

    inputs: Any
    spans: list[Span]
    answer_route: str

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


class Stopped(StoppingCriteria):
    """True once somebody has asked to stop: (batch,)."""

    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class MergedModel:
    """name: what it was loaded from, for titles. Experts come in the order of their routes."""

    def __init__(self, model: Any, processor: Any, name: str):
        self.model, self.processor, self.name = model, processor, name
        self.experts = list(model.config.expert_names)
        self.routes = [*PARAMETERS, *self.experts]
        self.text_route = processor.text_route

    @property
    def experts_by_modality(self) -> dict[str, list[str]]:
        """Modality -> the experts that take it, the one that is asked by default first."""
        found: dict[str, list[str]] = {}
        for modality, default in self.processor.default_experts.items():
            others = [name for name in self.experts if modality in self.model.config.experts[name]["placeholders"]]
            found[modality] = sorted(others, key=lambda name: name != default)
        order = ("image", "audio", "video", "point_cloud")
        return {modality: found[modality] for modality in order if modality in found}

    def read(self, chat: Sequence[dict[str, Any]], text_route: str = AUTO, cut_sounds: bool = False) -> Prompt:
        """cut_sounds: of a sound that is longer than its expert hears, take the start.

        Raises Refused for what the processor refuses: files it cannot read, sounds too long, unknown routes.
        """
        cut: dict[str, Any] = {"audio_kwargs": {"truncation": True}} if cut_sounds else {}
        try:
            inputs = self.processor.apply_chat_template(
                list(chat), tokenize=True, return_dict=True, add_generation_prompt=True,
                text_route=text_route, processor_kwargs=cut,
            )  # fmt: skip
        except (ValueError, OSError, ImportError) as error:
            raise Refused(without_folders(str(error), chat)) from error
        ids, routes, kinds = (inputs[name][0].tolist() for name in ("input_ids", "route_ids", "mm_token_type_ids"))
        found = spans(ids, routes, kinds, self.routes, self.processor.tokenizer.decode)
        return Prompt(inputs, found, self.routes[int(inputs["text_route"][0])])

    def answer(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """The answer in pieces; greedy at temperature 0. It ends early when `stop` is set, or when it is closed.

        Raises Refused where prompt and answer are longer than the language model takes.
        """
        room = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if room is not None and prompt.length + max_new_tokens > room:
            raise Refused(
                f"the chat has {prompt.length} tokens and the answer may have {max_new_tokens}, but this model takes "
                f"{room} together: start a new chat, or ask for a shorter answer"
            )
        stop = stop or threading.Event()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        failures: list[Exception] = []

        def work() -> None:
            try:
                self.model.generate(
                    **prompt.inputs.to(self.model.device), max_new_tokens=max_new_tokens, streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Stopped(stop)]), **(sampling or {"do_sample": False}),
                )  # fmt: skip
            except Exception as error:
                failures.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, name=GENERATES, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]


def load(
    source: str,
    revision: str | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    model_class: Any = AutoModel,
    processor_class: Any = AutoProcessor,
    trust_remote_code: bool = True,
) -> MergedModel:
    """dtype: auto is as stored, but float32 on a processor, where other types are slow. device: auto is a GPU if there
    is one. Raises ValueError for other words, OSError where nothing is found."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(DTYPES)}")
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == AUTO and torch.device(device).type == "cpu":
        dtype = "float32"
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    options |= {"revision": revision} if revision else {}
    model = model_class.from_pretrained(source, dtype=dtype, **options).to(device).eval()
    return MergedModel(model, processor_class.from_pretrained(source, **options), source)
