"""What a user does with a merged repo, in a process that can not import the rooms. Run by test_hub_repo.py.

usage: python consume_repo.py REPO SCRATCH [FACTS.json]; writes what it saw into FACTS.json.
"""

import json
import sys
from pathlib import Path

import blocked_rooms

blocked_rooms.block()

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

repo, scratch = sys.argv[1], Path(sys.argv[2])
facts: dict = {}
remote = dict(trust_remote_code=True)

rng = np.random.default_rng(0)
picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
sound = rng.standard_normal(16000).astype(np.float32)
picture.save(scratch / "picture.png")
soundfile.write(scratch / "sound.wav", sound, 16000)

# every Auto class gives the same model

config = AutoConfig.from_pretrained(repo, **remote)
facts["experts"] = config.expert_names
model, info = AutoModel.from_pretrained(repo, output_loading_info=True, **remote)
facts["loading"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
facts["module"] = type(model).__module__
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    assert type(auto.from_pretrained(repo, **remote)).__name__ == "MMERForConditionalGeneration", auto
processor = AutoProcessor.from_pretrained(repo, **remote)
assert len(AutoTokenizer.from_pretrained(repo, **remote)) == len(processor.tokenizer)
model.eval()


def chat(*blocks):
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "what is this ?"}]}]


def inputs_of(*chats):
    words = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    return processor.apply_chat_template(list(chats), **words)


by_array = ({"type": "image", "image": picture}, {"type": "audio", "audio": sound})
by_path = (
    {"type": "image", "path": str(scratch / "picture.png")},
    {"type": "audio", "path": str(scratch / "sound.wav")},
)
chats = [chat(), chat(by_array[0]), chat(by_array[1]), chat(*by_array)]

# generate: a batch equals each alone, files equal arrays

batch = inputs_of(*chats)
facts["text_route"] = batch["text_route"].tolist()
facts["keys"] = sorted(batch)
how = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :].tolist()
for one, want in zip(chats, together, strict=True):
    alone = inputs_of(one)
    assert model.generate(**alone, **how)[0, alone["input_ids"].shape[1] :].tolist() == want
files = inputs_of(chat(*by_path))
assert torch.equal(files["input_ids"], inputs_of(chats[3])["input_ids"])
torch.testing.assert_close(files["image.pixel_values"], inputs_of(chats[3])["image.pixel_values"])
facts["answers"] = together

# pipelines

expected = [text.strip() for text in processor.batch_decode(together, skip_special_tokens=True)]
for task in ("any-to-any", "image-text-to-text"):
    pipe = pipeline(task, model=repo, **remote)
    words = dict(return_full_text=False, generate_kwargs=how)
    for index in (0, 1) if task == "image-text-to-text" else range(4):
        (answer,) = [pipe(text=chats[index], **words)]
        assert answer[0]["generated_text"].strip() == expected[index], (task, index, answer, expected[index])
    out = pipe(text="<image> what is this ?", images=picture, **words)
    assert isinstance(out[0]["generated_text"], str)
pipe = pipeline("text-generation", model=repo, **remote)
out = pipe([{"role": "user", "content": "what is this ?"}], return_full_text=False, **how)
assert out[0]["generated_text"].strip() == expected[0]

# saved again and loaded again: the same model, from files alone

again = scratch / "again"
model.save_pretrained(again)
processor.save_pretrained(again)
facts["saved"] = sorted(path.name for path in again.iterdir())
second = AutoModel.from_pretrained(again, **remote).eval()
second_processor = AutoProcessor.from_pretrained(again, **remote)
with torch.no_grad():
    assert torch.equal(second(**batch).logits, model(**batch).logits)
words = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
repeated = second_processor.apply_chat_template(chats, **words)
assert sorted(repeated) == sorted(batch) and all(torch.equal(repeated[key], batch[key]) for key in batch)
assert second.config.auto_map == model.config.auto_map
facts["auto_map"] = second.config.auto_map
assert blocked_rooms.still_blocked()
Path(sys.argv[3]).write_text(json.dumps(facts))
