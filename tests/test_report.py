"""The report page as a file: self-contained, small, harmless, written whole or not at all."""

import base64
import gzip
import hashlib
import html.parser
import json
import re
from unittest import mock

import pytest

from adapters_fixtures import assert_refused, bert_pairs, lotr, lotr_process, snapshot, write_lora
from lotrtensor.errors import FormatError
from lotrtensor.report.page import MARK, check_page, page, plotly_source, write_page

pytest.importorskip("plotly")


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and the text of scripts by their id or type."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._inside = dict(attrs).get("id", tag)
            self.scripts[self._inside] = ""

    def handle_endtag(self, tag):
        if tag in ("script", "style", "title"):
            self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] += data

    def meta(self, name):
        (found,) = (a["content"] for t, a in self.tags if t == "meta" and name in a.values())
        return found


EVIL = "</script><img src=x onerror=alert(1)>&amp;<!--"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of two adapters whose names are HTML, and the document that it shows."""
    folder = tmp_path_factory.mktemp("report")
    pairs = {
        name.replace("intermediate", EVIL.replace(".", "")): pair
        for name, pair in bert_pairs(4, 3).items()
    }
    paths = [
        write_lora(folder / "<b>one", pairs, base_model_name_or_path=EVIL),
        write_lora(folder / "it's & 'two'", bert_pairs(4, 3, 1)),
    ]
    done = lotr("analyze", *paths, "-o", folder / "report.html", "--json")
    assert done.code == 0, done.err
    return folder / "report.html", json.loads(done.out)


@pytest.fixture(scope="module")
def elements(written):
    return Elements(written[0].read_text(encoding="utf-8"))


def test_the_page_is_below_six_megabytes(written):
    assert 1e6 < written[0].stat().st_size < 6e6


def test_the_page_names_no_other_place(elements):
    """No source, no link but to itself, no import and no address that a browser would open."""
    for _, attributes in elements.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    style = elements.scripts["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style + elements.scripts["script"]


def test_plotly_is_embedded_once_and_whole(elements):
    packed = base64.b64decode(elements.scripts["plotly"])
    assert gzip.decompress(packed).decode() == plotly_source()


def test_only_the_embedded_scripts_may_run(elements):
    """The policy holds the hash of each, and allows no connection."""
    policy = elements.meta("Content-Security-Policy")
    assert "default-src 'none'" in policy
    for script in (elements.scripts["script"], plotly_source()):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    (allowed,) = re.findall(r"script-src ([^;]*)", policy)
    assert len(allowed.split()) == 2
    assert "unsafe" not in allowed


def test_the_page_embeds_the_document_that_json_prints(written, elements):
    assert json.loads(elements.scripts["analysis"]) == written[1]


def test_names_from_files_are_text(written, elements):
    """They end no element and open none."""
    text = written[0].read_text(encoding="utf-8")
    assert EVIL in json.dumps(written[1])
    assert EVIL not in text
    assert not [tag for tag, _ in elements.tags if tag in ("img", "b")]
    assert "<b>one" in elements.scripts["title"] or "&lt;b&gt;one" in text
    assert [t for t, _ in elements.tags].count("script") == 3


def test_every_figure_has_a_table_beside_it(elements):
    """A place for each, and a heading for each section."""
    ids = {attributes.get("id") for _, attributes in elements.tags}
    plots = {a["id"] for _, a in elements.tags if "plot" in a.get("class", "").split()}
    tables = {name.removesuffix("-table") for name in ids if name and name.endswith("-table")}
    assert {plot.rpartition("-")[0] or plot for plot in plots} <= tables
    labels = [a["aria-labelledby"] for _, a in elements.tags if "aria-labelledby" in a]
    assert set(labels) <= ids


# ---------------------------------------------------------------- writing it


def test_an_existing_page_is_refused_without_force_and_replaced_with_it(written, tmp_path):
    path = write_lora(tmp_path / "lora", bert_pairs(2, 2))
    out = tmp_path / "report.html"
    assert lotr("analyze", path, "-o", out).code == 0
    before = snapshot(tmp_path)
    assert_refused(lotr("analyze", path, "-o", out), out, "--force")
    assert snapshot(tmp_path) == before
    out.write_bytes(written[0].read_bytes())
    assert lotr("analyze", path, "-o", out, "--force").code == 0
    assert out.read_bytes() == before["report.html"]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_force_replaces_nothing_but_a_page(tmp_path, kind):
    """A slip of the hand must not cost a model."""
    path, out = write_lora(tmp_path / "lora", bert_pairs(2, 2)), tmp_path / "out"
    target = tmp_path / "model"
    target.write_text("precious")
    if kind == "file":
        out.write_text("precious")
    elif kind == "directory":
        out.mkdir()
    else:
        out.symlink_to(target)
    before = snapshot(tmp_path)
    assert_refused(lotr("analyze", path, "-o", out, "--force"), out)
    assert snapshot(tmp_path) == before


def test_a_refused_output_is_refused_before_any_work(tmp_path):
    """Even where the adapter does not exist."""
    (tmp_path / "out").write_text("precious")
    assert_refused(lotr("analyze", tmp_path / "missing", "-o", tmp_path / "out"), "out")


def test_a_failed_write_leaves_nothing(tmp_path):
    """Neither the page, nor what it was written to first, nor the folder made for it."""
    out = tmp_path / "new" / "report.html"
    with (
        mock.patch("os.fsync", side_effect=OSError(28, "No space left")),
        pytest.raises(FormatError, match="No space left"),
    ):
        write_page(out, MARK, force=False)
    assert not out.parent.exists()
    write_page(out, MARK, force=False)
    assert out.read_text() == MARK
    check_page(out, force=True)


def test_a_bad_adapter_writes_no_page(tmp_path):
    good = write_lora(tmp_path / "good", bert_pairs(2, 2))
    assert_refused(lotr("analyze", good, tmp_path / "bad", "-o", tmp_path / "r.html"), "bad")
    assert not (tmp_path / "r.html").exists()


def test_without_plotly_one_sentence_names_the_extra(tmp_path):
    """And the terminal's table needs none."""
    path = write_lora(tmp_path / "lora", bert_pairs(2, 2))
    block = "import sys; sys.modules['plotly'] = None"
    found = lotr_process("analyze", path, "-o", tmp_path / "r.html", prelude=block)
    assert_refused(found, "plotly", "pip install 'lotrtensor[report]'")
    assert not (tmp_path / "r.html").exists()
    assert lotr_process("analyze", path, prelude=block).code == 0


def test_a_document_with_a_nan_is_never_written(written):
    """JSON has no word for it: null."""
    document = json.loads(json.dumps(written[1]))
    document["adapters"][0]["choices"][0]["relative_error"] = float("nan")
    found = json.loads(Elements(page(document, "")).scripts["analysis"])
    assert found["adapters"][0]["choices"][0]["relative_error"] is None
