"""Licences: where they are read, which is the strictest, which do not go together."""

import pytest

from hub_cards.licenses import CLASSES, Licence, clashes, of_fields, of_text, read_license, strictest

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = (
    "MIT License\n\nCopyright (c) 2024\n\nPermission is hereby granted, free of charge, to any person obtaining a copy"
)
GPL = "                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n"
LGPL = "                   GNU LESSER GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n"
LLAMA2 = "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n"
LLAMA31 = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"
NC = "Attribution-NonCommercial 4.0 International\n\n====\n\nCreative Commons Corporation"
BY = "Creative Commons Attribution 4.0 International Public License"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (APACHE, "apache-2.0"), (MIT, "mit"), (GPL, "gpl-3.0"), (LGPL, "lgpl-3.0"), (LLAMA2, "llama2"),
        (LLAMA31, "llama3.1"), ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"), (NC, "cc-by-nc-4.0"),
        (BY, "cc-by-4.0"), ("Gemma Terms of Use\n\nLast modified", "gemma"), ("All rights reserved.", "unknown"),
    ],
)  # fmt: skip
def test_a_text_is_recognised(text, name, tmp_path):
    assert of_text(text) == name
    (tmp_path / "LICENSE").write_text(text)
    assert read_license(str(tmp_path)) == (Licence(name, read_in="LICENSE") if name != "unknown" else Licence())


@pytest.mark.parametrize(
    ("fields", "key", "kind", "written"),
    [
        ({"license": "Apache-2.0"}, "apache-2.0", "permissive", {"license": "apache-2.0"}),
        ({"license": ["mit", "cc-by-nc-4.0"]}, "cc-by-nc-4.0", "non-commercial", {"license": "cc-by-nc-4.0"}),
        ({"license": "other", "license_name": "qwen", "license_link": "LICENSE"}, "qwen", "use limits",
         {"license": "other", "license_name": "qwen"}),
        ({"license": "other", "license_name": "llama2"}, "llama2", "use limits", {"license": "llama2"}),
        ({"license": "other", "license_name": "ours", "license_link": "https://a.org/l"}, "ours", "unknown",
         {"license": "other", "license_name": "ours", "license_link": "https://a.org/l"}),
        ({"license": "other"}, "other", "unknown", {"license": "other", "license_name": "other"}),
        ({"license": 7, "tags": ["x"]}, "unknown", "unknown", {"license": "unknown"}),
        ({}, "unknown", "unknown", {"license": "unknown"}),
    ],
)  # fmt: skip
def test_fields_of_a_card(fields, key, kind, written):
    found = of_fields(fields)
    assert (found.key, found.kind, found.front_matter()) == (key, kind, written)


def test_the_card_comes_before_the_text(tmp_path):
    (tmp_path / "LICENSE").write_text(GPL)
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n# words\n")
    assert read_license(str(tmp_path)) == Licence("gemma", read_in="README.md")
    for broken in ("---\nlicense: [\n---\n", "---\n- a list\n---\n", "no front matter", "---\ntags: [x]\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert read_license(str(tmp_path)).id == "gpl-3.0", broken


def test_what_cannot_be_read_is_unknown(tmp_path):
    assert read_license(str(tmp_path)) == Licence()
    assert read_license(str(tmp_path / "gone")) == Licence()
    assert read_license("org/of-the-hub") == Licence(), "no network here"


def test_the_strictest_asks_for_most():
    order = ["mit", "apache-2.0", "cc-by-4.0", "gpl-3.0", "gemma", "llama2", "cc-by-nc-4.0", "cc-by-nd-4.0"]
    licences = [Licence(name) for name in order]
    for place in range(1, len(order)):
        assert strictest(licences[:place][::-1]).id == order[place - 1]
    assert strictest([*licences, Licence()]).id == "unknown", "without a licence nothing is permitted"
    places = [CLASSES.index(licence.kind) for licence in licences]
    assert places == sorted(places)
    with pytest.raises(ValueError, match="no licences to compare"):
        strictest([])


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("apache-2.0", "llama2", True), ("mit", "gpl-3.0", True), ("apache-2.0", "gpl-3.0", True),
        ("llama2", "cc-by-nc-4.0", True), ("gpl-3.0", "gpl-3.0", True), ("cc-by-sa-4.0", "gpl-3.0", True),
        ("gpl", "gpl-3.0", True), ("cc-by-4.0", "cc-by-sa-4.0", True), ("unknown", "gpl-3.0", True),
        ("mpl-2.0", "gpl-3.0", True), ("apache-2.0", "gpl-2.0", False), ("llama2", "gpl-3.0", False),
        ("gemma", "cc-by-sa-4.0", False), ("cc-by-nc-4.0", "gpl-3.0", False), ("cc-by-nc-sa-4.0", "llama3", False),
        ("cc-by-nc-sa-4.0", "cc-by-sa-4.0", False), ("gpl-2.0", "gpl-3.0", False),
    ],
)  # fmt: skip
def test_pairs(first, second, together):
    for one, other in ((first, second), (second, first)):
        found = clashes({"base": Licence(one), "experts.a.model": Licence(other)})
        assert (not found) == together
        assert all("base is under" in words and one in words and other in words for words in found)


def test_no_changes_means_no_merge():
    (found,) = clashes({"base": Licence("mit"), "experts.a.lora": Licence("cc-by-nc-nd-4.0")})
    assert found == "experts.a.lora is under cc-by-nc-nd-4.0, which forbids to pass on changed works"
