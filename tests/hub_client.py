"""What test_push.py does in processes of their own, with a Hub at HF_ENDPOINT.

usage: python hub_client.py publish FACTS.json FOLDER | consume FACTS.json PINNED | reload FACTS.json PINNED
Only `publish` can import the rooms. What was seen is written into FACTS.json.
"""

import json
import sys
from pathlib import Path

import blocked_rooms

if sys.argv[1] not in ("publish", "merge"):
    blocked_rooms.block()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoProcessor, pipeline  # noqa: E402

REPO, SHARDED, AGAIN = "org/mmer-tiny", "org/mmer-sharded", "org/mmer-again"
HOW = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)


def chats() -> list:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
    sound = rng.standard_normal(16000).astype(np.float32)
    media = [[], [{"type": "image", "image": picture}], [{"type": "audio", "audio": sound}]]
    words = {"type": "text", "text": "what is this ?"}
    return [[{"role": "user", "content": [*blocks, words]}] for blocks in media]


def answers(model, processor) -> list[list[int]]:
    """Token ids of the answers to text, a picture, a sound."""
    words = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    batch = processor.apply_chat_template(chats(), **words)
    return model.eval().generate(**batch, **HOW)[:, batch["input_ids"].shape[1] :].tolist()


def load(repo: str, **revision):
    model, info = AutoModel.from_pretrained(repo, trust_remote_code=True, output_loading_info=True, **revision)
    assert not any(info.values()), info
    return model, AutoProcessor.from_pretrained(repo, trust_remote_code=True, **revision)


def piped(*task: str, model: str = REPO) -> dict:
    pipe = pipeline(*task, model=model, trust_remote_code=True)
    texts = [pipe(text=chat, return_full_text=False, generate_kwargs=HOW)[0]["generated_text"] for chat in chats()]
    return {"task": pipe.task, "texts": texts}


def publish(folder: str) -> dict:
    from huggingface_hub.errors import HfHubHTTPError

    from modeling_mmer import MMERForConditionalGeneration
    from processing_mmer import MMERProcessor

    model, processor = MMERForConditionalGeneration.from_pretrained(folder), MMERProcessor.from_pretrained(folder)
    facts: dict = {"answers": answers(model, processor)}
    facts["texts"] = processor.batch_decode(facts["answers"], skip_special_tokens=True)

    facts["commit"] = model.push_to_hub(REPO, commit_message="first", tags=["tiny"]).oid
    processor.push_to_hub(REPO)
    facts["pull_request"] = processor.push_to_hub(REPO, tags="proposed", create_pr=True).pr_url
    processor.push_to_hub(REPO, tags=["next"], revision="next")

    # a folder with a card and with files of other origin; many weight files, and after them a single one
    out = Path("out")
    out.mkdir()
    (out / "README.md").write_text("---\npipeline_tag: any-to-any\nlicense: mit\n---\nby hand\n")
    (out / "optimizer.pt").write_bytes(b"not for the Hub")
    upload = dict(push_to_hub=True, repo_id=SHARDED, private=True)
    model.save_pretrained(out, max_shard_size="60KB", commit_message="shards", **upload)
    facts["returned"] = [Path(path).name for path in processor.save_pretrained(out, **upload)]
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.push_to_hub(SHARDED, commit_message="another model")

    try:
        model.push_to_hub("org/mmer-else", token="wrong")
    except HfHubHTTPError as error:
        facts["refused"] = error.response.status_code
    return facts


def consume(pinned: str) -> dict:
    model, processor = load(REPO)
    facts: dict = {"answers": answers(model, processor), "module": type(model).__module__}
    facts["named"], facts["inferred"] = piped("any-to-any"), piped()
    facts["pinned"] = answers(*load(SHARDED, revision=pinned))
    facts["moved"] = answers(*load(SHARDED))

    model.push_to_hub(AGAIN)
    processor.push_to_hub(AGAIN)
    second, its_processor = load(AGAIN)
    facts["again"], facts["again_module"] = answers(second, its_processor), type(second).__module__
    return facts


def reload(pinned: str) -> dict:
    return {
        "answers": answers(*load(REPO)),
        "named": piped("any-to-any"),
        "pinned": answers(*load(SHARDED, revision=pinned)),
        "again": answers(*load(AGAIN)),
    }


if __name__ == "__main__":
    found = {"publish": publish, "consume": consume, "reload": reload}[sys.argv[1]](sys.argv[3])
    assert sys.argv[1] == "publish" or blocked_rooms.still_blocked()
    Path(sys.argv[2]).write_text(json.dumps(found))
