"""Tokens and rows that the base and its experts do not share: merged, loaded, and asked by value."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging_mmer.added_rows import lay_out, read_rows
from merging_mmer.vocabulary import AddedVocabularyToken

from . import tiny_several as several
from .tiny_processors import picture, text, user

tiny = several.tiny
ASK = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CHAT = [user(picture(0), text("what is this ?"))]
# words of the tokenizer (the base has 96 rows), rows of padding of each expert, tied, what each expert brings
CASES = {
    "same id, other tokens": dict(more=(("<left>",), ("<right>",))),
    "same token, other ids": dict(more=(("<left>", "<both>"), ("<both>",))),
    "same token, same id": dict(more=(("<both>",), ("<both>",))),
    "padded experts": dict(rows=(64, 32), more=(("<left>",), ("<both>", "<left>"))),
    "padded base": dict(words=90, more=(("<left>",), ("<both>", "<left>"))),
    "all padded": dict(words=91, rows=(40, 3), more=(("<both>",), ("<both>",))),
    "tied": dict(tied=True, words=93, rows=(2, 64), more=(("<both>",), ("<right>", "<both>"))),
    "nothing trained": dict(noise=0.0, words=90, more=(("<both>",), ("<both>",))),
}


def make(folder, words=96, rows=(0, 0), more=((), ()), tied=False, noise=0.1):
    """A base and two llava experts; the recipe that merges them."""
    base = several.save_base(folder / "base", words=words, tie_word_embeddings=tied)
    for seed, name in enumerate(("one", "two")):
        several.save_expert(
            folder / name, "llava", base, seed + 1, more[seed], words=words, rows=rows[seed], noise=noise
        )
    return {"base": str(folder / "base"), "experts": {name: str(folder / name) for name in ("one", "two")}}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    recipe = make(folder, **CASES[request.param])
    model, processor = several.merge_and_load(recipe, folder / "mmer-tokens")
    values = {"words": 96, "tied": False, "noise": 0.1, **CASES[request.param]}
    return SimpleNamespace(**values, folder=folder, model=model, processor=processor)


def asked(processor, name):
    return processor.apply_chat_template(CHAT, experts={"image": name}, **ASK)


def test_text_alone_is_the_base_bit_for_bit_padding_included(case):
    base = tiny.base_model(tie_word_embeddings=case.tied).eval()
    every_id = torch.arange(tiny.ROWS)[None]
    mask = torch.ones_like(every_id)
    with torch.no_grad():
        none = torch.zeros_like(every_id)
        got = case.model(input_ids=every_id, route_ids=none, text_route=none[:, 0])
        assert torch.equal(got.logits, base(every_id).logits)
    prompt = case.processor(text="what is this ?")
    got = case.model.generate(**prompt, **GREEDY)
    assert torch.equal(got, base.generate(prompt["input_ids"], attention_mask=mask[:, :4], **GREEDY))


@pytest.mark.parametrize("name", ["one", "two"])
def test_each_route_is_its_expert(case, name):
    own_model, own_processor = several.stock(case.folder / name)
    theirs = own_processor.apply_chat_template(CHAT, processor_kwargs={"return_tensors": "pt"}, **ASK)
    ours = asked(case.processor, name)
    table = several.columns(case.model, case.processor, name, own_processor.tokenizer)
    brought = case.more[0 if name == "one" else 1]
    vocabulary = case.processor.tokenizer.get_vocab()
    for token in brought:  # the expert reads its own added tokens with its own rows, and writes them with its own
        own_id = own_processor.tokenizer.convert_tokens_to_ids(token)
        assert table[own_id] == vocabulary[token] >= case.words
        theirs["input_ids"] = torch.cat([theirs["input_ids"], torch.tensor([[own_id]])], 1)
        ours["input_ids"] = torch.cat([ours["input_ids"], torch.tensor([[vocabulary[token]]])], 1)
    kept = {key: value for key, value in ours.items() if "." in key}
    with torch.no_grad():
        got = case.model(input_ids=ours["input_ids"], text_route=name, **kept).logits[0]
        want = own_model(input_ids=theirs["input_ids"], pixel_values=theirs["pixel_values"]).logits[0]
    several.same_logits(got[:, list(table.values())], want[:, list(table)])
    strangers = {vocabulary[token] for token in vocabulary if vocabulary[token] >= case.words} - set(table.values())
    assert torch.isinf(got[:, sorted(strangers)]).all()


def test_padding_is_never_averaged_nor_added(case):
    stored = tiny.tensors(case.folder / "mmer-tokens")
    base = tiny.base_model(tie_word_embeddings=case.tied)
    matrices = {"model.language_model.embed_tokens": base.get_input_embeddings().weight}
    if not case.tied:
        matrices["lm_head"] = base.get_output_embeddings().weight
    for name, theta_0 in matrices.items():
        assert torch.equal(stored[f"{name}.weight"], theta_0)
        if f"{name}.delta" in stored:
            assert not stored[f"{name}.delta"][case.words :].any() and stored[f"{name}.delta"][: case.words].any()
            assert not stored[f"{name}.masks"][:, case.words :].any()
    tokens = case.model.config.added_tokens
    assert len(tokens) == 2 + len(set(case.more[0]) | set(case.more[1]))
    # a token that both brought and tuned apart has a row for each of them beside the mean
    shared = set(case.more[0]) & set(case.more[1]) if case.noise else set()
    assert len(stored["model.added_embeddings.weight"]) == len(tokens) + 2 * len(shared)


def test_rows_of_a_shared_token_by_value(case):
    stored = tiny.tensors(case.folder / "mmer-tokens")
    places = {"model.added_embeddings.weight": "embed_tokens.weight"} | (
        {} if case.tied else {"added_head.weight": "lm_head.weight"}
    )
    for place, entry in enumerate(case.model.config.added_tokens):
        for matrix, name in places.items():
            own = {}
            for expert in entry["experts"]:
                weights = tiny.tensors(case.folder / expert)
                full = next(key for key in weights if key.endswith(name))
                token = "<image>" if entry["token"].startswith("<image") else entry["token"]
                order = ["<image>", *case.more[0 if expert == "one" else 1]]
                own[expert] = weights[full][case.words + order.index(token)]
                row = entry.get("rows", {}).get(expert, place)
                assert torch.equal(stored[matrix][row], own[expert]), (entry, expert)
            torch.testing.assert_close(stored[matrix][place], sum(own.values()) / len(own))


def test_the_merged_route_writes_every_word_and_no_placeholder(case):
    inputs = case.processor(text="<image> <image:two> what", images=[picture(0)["image"], picture(1)["image"]])
    with torch.no_grad():
        logits = case.model(**inputs).logits[0, -1]
    for entry in case.model.config.added_tokens:
        assert torch.isfinite(logits[entry["id"]]) == (not entry["token"].startswith("<image"))


# what is generated


def aim(folder, token: int, hidden: torch.Tensor, factor: float):
    """Make an expert on disk answer `token` where its last state is `hidden`."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    name = next(key for key in stored if key.endswith("lm_head.weight"))
    stored[name][token] = factor * hidden / hidden.norm()
    save_file(stored, path, metadata={"format": "pt"})


@pytest.mark.parametrize("words", [96, 90])
def test_an_expert_generates_its_own_tokens_and_no_placeholder(tmp_path, words):
    recipe = make(tmp_path, words=words, more=(("<left>", "<both>"), ("<right>", "<both>")))
    wanted = {"one": "<left>", "two": "<right>"}
    for name in wanted:
        own_model, own_processor = several.stock(tmp_path / name)
        theirs = own_processor.apply_chat_template(CHAT, processor_kwargs={"return_tensors": "pt"}, **ASK)
        with torch.no_grad():
            hidden = own_model.model(**theirs).last_hidden_state[0, -1]
        aim(tmp_path / name, words, hidden, 90.0)  # its placeholder would win
        aim(tmp_path / name, words + 1, hidden, 60.0)
    model, processor = several.merge_and_load(recipe, tmp_path / "out")
    for name, token in wanted.items():
        own_model, own_processor = several.stock(tmp_path / name)
        theirs = own_processor.apply_chat_template(CHAT, processor_kwargs={"return_tensors": "pt"}, **ASK)
        own = own_model.generate(**theirs, **GREEDY, suppress_tokens=[words, *range(words + 3, 99)])
        inputs = asked(processor, name)
        found = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        assert processor.tokenizer.convert_ids_to_tokens(found[0]) == token
        table = several.columns(model, processor, name, own_processor.tokenizer)
        assert found == [table[one] for one in own[0, theirs["input_ids"].shape[1] :].tolist()]


def test_a_base_that_writes_its_padding_goes_on_as_it_would_alone(tmp_path):
    """The added tokens' ids lie among the base's padding rows; on the base route these are the base's."""
    recipe = make(tmp_path, words=90, more=(("<left>",), ("<right>",)))
    base = tiny.base_model().eval()
    ids = several.tokenizer(words=90)("what is this ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = base.model(ids).last_hidden_state[0, -1]
        base.lm_head.weight[90] = 60 * hidden / hidden.norm()
    tiny.save(base, tmp_path / "base")
    model, processor = several.merge_and_load(recipe, tmp_path / "out")
    placeholders = model.config.placeholder_experts()
    want = base.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert want[0, ids.shape[1]] == 90 and 90 in placeholders
    assert torch.equal(model.generate(**processor(text="what is this ?"), **GREEDY), want)


@pytest.mark.parametrize("order", [("own", "tied"), ("tied", "own")])
def test_an_expert_with_a_head_of_its_own_on_a_tied_base(tmp_path, order):
    """Only one expert tells head and embedding apart; the base and the other expert stay what they were."""
    base = several.save_base(tmp_path / "base", tie_word_embeddings=True)
    several.save_expert(tmp_path / "tied", "llava", base, 1, ("<left>",), noise=0.1)
    several.save_expert(tmp_path / "own", "llava", base, 2, ("<left>",), noise=0.1, tie_word_embeddings=False)
    stored = load_file(tmp_path / "own" / "model.safetensors")
    names = [next(key for key in stored if key.endswith(end)) for end in ("embed_tokens.weight", "lm_head.weight")]
    stored[names[1]] = stored[names[0]] + 0.05 * torch.randn_like(stored[names[0]])
    save_file(stored, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base": str(tmp_path / "base"), "experts": {name: str(tmp_path / name) for name in order}}
    model, processor = several.merge_and_load(recipe, tmp_path / "out")
    assert not model.config.tie_word_embeddings
    ids = torch.arange(tiny.ROWS)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base.eval()(ids).logits)
    for name in order:
        own_model, own_processor = several.stock(tmp_path / name)
        theirs = own_processor.apply_chat_template(CHAT, processor_kwargs={"return_tensors": "pt"}, **ASK)
        table = several.columns(model, processor, name, own_processor.tokenizer)
        with torch.no_grad():
            got, want = model(**asked(processor, name)).logits[0], own_model(**theirs).logits[0]
        several.same_logits(got[:, list(table.values())], want[:, list(table)])


# the layout of the rows


def test_a_static_merge_has_one_row_for_all(tmp_path):
    recipe = make(tmp_path, more=(("<both>",), ("<both>",)))
    model, _ = several.merge_and_load({**recipe, "decoupling": {"kind": "none"}}, tmp_path / "out")
    assert model.config.added_rows() == [[0, 1, 2]] * 4 and len(model.model.added_embeddings.weight) == 3


def test_the_order_of_experts_changes_no_row(tmp_path):
    recipe = make(tmp_path, more=(("<both>", "<left>"), ("<both>",)))
    other = {**recipe, "experts": dict(reversed(recipe["experts"].items()))}
    tables = []
    for place, one in enumerate((recipe, other)):
        model, _ = several.merge_and_load(one, tmp_path / f"out{place}")
        rows, config = model.model.added_embeddings.weight.detach(), model.config
        routes = dict(zip(["base", "merged", *config.expert_names], config.added_rows(), strict=True))
        names = [entry["token"] for entry in config.added_tokens]
        tables.append({(r, t): rows[routes[r][names.index(t)]] for r in routes for t in ("<both>", "<left>")})
    assert all(torch.equal(tables[0][key], tables[1][key]) for key in tables[0])


def test_layout_by_hand():
    def row(*values):
        return torch.tensor([values])

    rows = {"a": {"<x>": row(1.0, 2.0), "<y>": row(5.0, 5.0)}, "b": {"<x>": row(3.0, 2.0), "<y>": row(5.0, 5.0)}}
    matrices, own = lay_out(rows, ["<x>", "<y>", "<z>"], torch.zeros(1, 2))
    assert matrices.tolist() == [[[2.0, 2.0], [5.0, 5.0], [0.0, 0.0], [1.0, 2.0], [3.0, 2.0]]]
    assert own == {"<x>": {"a": 3, "b": 4}}
    # what rounding makes equal is one row
    near = {"a": {"<x>": row(1.0, 2.0)}, "b": {"<x>": row(1.0, 2.0001)}}
    matrices, own = lay_out(near, ["<x>"], torch.zeros(1, 2, dtype=torch.bfloat16))
    assert matrices.shape == (1, 1, 2) and own == {}


def test_rows_are_read_where_an_expert_has_them():
    matrix = torch.arange(12.0).view(6, 2)
    expert = SimpleNamespace(name="a", exact_tensor=lambda name: matrix * (2 if name == "head" else 1))
    tokens = [AddedVocabularyToken("<x>", 9, ["a"], {"a": 5}), AddedVocabularyToken("<y>", 10, ["a"], {"a": 6})]
    found = read_rows(expert, ["table", "head"], [*tokens, AddedVocabularyToken("<z>", 11, ["b"], {"b": 1})])
    assert {token: value.tolist() for token, value in found.items()} == {"<x>": [[10.0, 11.0], [20.0, 22.0]]}
