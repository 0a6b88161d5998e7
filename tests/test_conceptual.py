"""The table of Conceptual Captions: what is read of it, what is set aside, in which order."""

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipshift_core import conceptual
from clipshift_core.conceptual import FetchError, Link


def listing_of(folder, text):
    file = folder / "list.tsv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_good_lines_are_kept_and_bad_ones_set_aside_with_their_number(tmp_path):
    text = b"".join([
        b"\xef\xbb\xbfcaption\turl\r\n",
        b"a cat \thttp://a.org/1.jpg\r\n",
        b"\n",
        b"only a caption\n",
        b"a dog\thttps://b.org/2.jpg\tmore\n",
        b"a bird\tftp://c.org/3.jpg\n",
        b"caf\xe9\thttp://d.org/4.jpg\n",
        "un café\thttp://e.org/é.jpg\n".encode(),
        b"another cat\thttp://a.org/1.jpg\n",
        b" \thttp://f.org/5.jpg\n",
        b"long\thttp://g.org/" + b"x" * conceptual.MAX_LINE + b"\n",
        b"a space\thttp://h.org/6 7.jpg\n",
        b"no host\thttp:///8.jpg\n",
        b"the last\tHTTP://i.org/9.jpg",
    ])  # fmt: skip
    table = conceptual.read(listing_of(tmp_path, text), seed=0)
    assert set(table.links()) == {
        Link("a cat", "http://a.org/1.jpg"), Link("un café", "http://e.org/é.jpg"), Link("the last", "HTTP://i.org/9.jpg"),
    }  # fmt: skip
    assert dict(zip(table.set_aside["line"], table.set_aside["reason"], strict=True)) == {
        4: "1 column, not 2",
        5: "3 columns, not 2",
        6: "its second column is no http(s) URL",
        7: "not valid UTF-8",
        9: "a URL that an earlier line has",
        10: "no caption",
        11: "longer than 65,536 bytes",
        12: "its second column is no http(s) URL",
        13: "its second column is no http(s) URL",
    }


def test_the_order_is_that_of_a_hash_of_seed_and_url(tmp_path):
    urls = [f"http://a.org/{i}.jpg" for i in range(50)]
    table = conceptual.read(listing_of(tmp_path, "".join(f"c\t{url}\n" for url in urls)), seed=7)
    expected = sorted(urls, key=lambda url: hashlib.sha256(f"7/{url}".encode()).digest())
    assert [link.url for link in table.links()] == expected
    assert [link.url for link in table.links(48)] == expected[48:]
    more = conceptual.read(listing_of(tmp_path, "".join(f"c\t{url}\n" for url in [*urls[::-1], "http://b/"])), seed=7)
    assert [link.url for link in more.links() if link.url != "http://b/"] == expected
    other = conceptual.read(listing_of(tmp_path, "".join(f"c\t{url}\n" for url in urls)), seed=8)
    assert [link.url for link in other.links()] != expected
    key = Link("c", urls[0]).key
    assert key == hashlib.sha256(urls[0].encode()).hexdigest()[:16] and len(key) == 16


@pytest.mark.parametrize("text", ["", "\n\n", "caption\turl\n", "a\tb\tc\n", "a cat, http://a.org/1.jpg\n"])
def test_a_table_without_a_link_is_an_error(tmp_path, text):
    with pytest.raises(FetchError, match="list.tsv: no line is a caption, a tab"):
        conceptual.read(listing_of(tmp_path, text), seed=0)


def test_a_missing_or_changed_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FetchError, match="nowhere.tsv: cannot be read"):
        conceptual.read(tmp_path / "nowhere.tsv", seed=0)
    table = conceptual.read(listing_of(tmp_path, "a\thttp://a/1\nb\thttp://b/2\n"), seed=0)
    listing_of(tmp_path, "something else\n")
    with pytest.raises(FetchError, match="list.tsv: has changed"):
        list(table.links())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.integers(0, 30)), max_size=12), st.integers(0, 3))
def test_whatever_a_table_holds_every_good_line_is_kept(lines, seed):
    """Numbers stand for good lines, which may repeat; the rest is bytes of any kind, line ends among them."""
    good = dict.fromkeys(f"http://a.org/{line}.jpg" for line in lines if isinstance(line, int))
    text = b"\n".join(b"c\thttp://a.org/%d.jpg" % line if isinstance(line, int) else line for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = conceptual.read(listing_of(Path(folder), text), seed=seed)
        except FetchError:
            assert not good
            return
        found = [link.url for link in table.links()]
    assert len(found) == len(set(found)) and set(good) <= set(found)
