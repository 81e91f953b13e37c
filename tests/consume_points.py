"""What a user does with a merged repo whose expert reads point clouds, in a process that can not import the rooms.

usage: python consume_points.py REPO SCRATCH [FACTS.json]; writes what it saw into FACTS.json.
"""

import json
import sys
from pathlib import Path

import blocked_rooms

blocked_rooms.block()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import trimesh  # noqa: E402
from transformers import AutoModel, AutoProcessor, pipeline  # noqa: E402

repo, scratch = sys.argv[1], Path(sys.argv[2])
remote = dict(trust_remote_code=True)
model, info = AutoModel.from_pretrained(repo, output_loading_info=True, **remote)
processor = AutoProcessor.from_pretrained(repo, **remote)
model.eval()
facts: dict = {"loading": {key: sorted(map(str, value)) for key, value in info.items() if value}}

cloud = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
np.save(scratch / "cloud.npy", cloud)
trimesh.PointCloud(cloud).export(scratch / "cloud.ply")
for suffix in ("obj", "glb"):
    trimesh.creation.box((1, 2, 3)).export(scratch / f"box.{suffix}")
words = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)


def chat(**block):
    text = {"type": "text", "text": "what is this ?"}
    return [{"role": "user", "content": [{"type": "point_cloud", **block}, text]}]


# a chat's block by path, by array and `point_clouds=` are one

inputs = processor.apply_chat_template(chat(path=str(scratch / "cloud.npy")), **words)
prompt = processor.apply_chat_template(chat(point_cloud=cloud), tokenize=False, add_generation_prompt=True)
same = (
    processor.apply_chat_template(chat(point_cloud=cloud), **words),
    processor.apply_chat_template(chat(path=str(scratch / "cloud.ply")), **words),
    processor(text=prompt, point_clouds=cloud, return_tensors="pt", add_special_tokens=False),
)
for other in same:
    for key in ("points.point_clouds", "input_ids", "route_ids"):
        assert torch.equal(other[key], inputs[key]), key
facts["shape"] = list(inputs["points.point_clouds"].shape)
facts["placeholders"] = int((inputs["mm_token_type_ids"] == 4).sum())
facts["text_route"] = inputs["text_route"].tolist()

# meshes give points on their surface: a batch of both equals each alone

how = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
chats = [chat(path=str(scratch / "box.obj")), chat(path=str(scratch / "box.glb")), chat(point_cloud=cloud)]
batch = processor.apply_chat_template(chats, **words)
together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :].tolist()
for one, want in zip(chats, together, strict=True):
    alone = processor.apply_chat_template(one, **words)
    assert model.generate(**alone, **how)[0, alone["input_ids"].shape[1] :].tolist() == want
facts["answers"] = together

pipe = pipeline("any-to-any", model=repo, **remote)
answer = pipe(text=chats[2], return_full_text=False, generate_kwargs=how)[0]["generated_text"].strip()
assert answer == processor.batch_decode(together, skip_special_tokens=True)[2].strip()

# other points, other logits; saved and loaded again, the same ones

with torch.no_grad():
    first = model(**inputs).logits
    moved = {**inputs, "points.point_clouds": inputs["points.point_clouds"].flip(-1)}
    known = first.isfinite()  # tokens of other experts are never written
    facts["change"] = float((model(**moved).logits - first)[known].abs().max())
    model.save_pretrained(scratch / "again")
    processor.save_pretrained(scratch / "again")
    second = AutoModel.from_pretrained(scratch / "again", **remote).eval()
    again = AutoProcessor.from_pretrained(scratch / "again", **remote)
    assert torch.equal(second(**again.apply_chat_template(chat(point_cloud=cloud), **words)).logits, first)
assert blocked_rooms.still_blocked()
Path(sys.argv[3]).write_text(json.dumps(facts))
