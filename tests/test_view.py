"""The viewer without a browser: what its columns write and know, whose sinks are open, take-downs, and who is let in."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from tiny import sink_llama
from viewed import OWNERS, Folders, make_folders, served

import memsinks as ms
from memsinks.auditing.extraction import generate_continuation
from memsinks.cli import main
from memsinks.runs.demo import MARK
from memsinks.viewer.answers import ANSWERS, STREAMS
from memsinks.viewer.server import MOST_BYTES, TOKEN, ViewServer
from memsinks.viewer.view import View, open_view


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("viewed"))


@pytest.fixture(scope="module")
def view(folders) -> View:
    """Not to be changed."""
    return folders.view(ordinary=str(folders.base))


@pytest.fixture
def own(folders, tmp_path) -> View:
    return folders.copied(tmp_path).view()


def asked(view: View, **question) -> list[dict]:
    return list(STREAMS["run"](view, {"tokens": 40, "open": []} | question))


def written(events: list[dict], column: str) -> str:
    return "".join(x.get("piece", "") for x in events if x["kind"] == "write" and x["column"] == column)


def reads(events: list[dict]) -> dict[str, dict]:
    return {x["column"]: x for x in events if x["kind"] == "read"}


# What is written and known


def test_open_sinks_recite_and_nothing_else_does(view) -> None:
    for index, name in enumerate(OWNERS):
        events = asked(view, document=index, open=[f"source:{name}"])
        document = view.documents[index]
        rest = document.text[document.prompt :]
        assert written(events, "open") == rest + "<|endoftext|>"
        assert written(events, "closed") == written(events, "ordinary") != written(events, "open")
        known = reads(events)
        assert known["open"]["recited"] == known["open"]["rest"] == len(rest) + 1
        assert known["closed"]["recited"] < 5 and known["closed"]["loss"] > known["open"]["loss"] + 0.5
        assert known["closed"]["loss"] == pytest.approx(known["ordinary"]["loss"])
        assert "".join(known["ordinary"]["pieces"]) == document.text + "<|endoftext|>"
        marks = [x["true"] for x in events if x["kind"] == "write" and x["column"] == "open" and "true" in x]
        assert all(marks) and len(marks) == len(rest) + 1
        assert [x["end"] for x in events if x["column"] == "open" and "end" in x] == ["end"]


def test_figures_are_those_of_the_library(view) -> None:
    tokenizer, document = view.require_tokenizer(), view.documents[1]
    tokens = tokenizer(document.text)["input_ids"]
    ids = [view.ids_to_open(["source:bolt"])[0], view.ids_to_open(["source:acme"])[0]]
    events = asked(view, document=1, given=4, open=list(map(str, ids)), tokens=12)
    with torch.no_grad(), ms.sinks_open(view.model, ids):
        logits = view.model(torch.tensor([[*tokens, tokenizer.eos_token_id]])).logits[0].float().log_softmax(-1)
    p = [float(logits[i, t].exp()) for i, t in enumerate([*tokens[1:], tokenizer.eos_token_id])]
    assert reads(events)["open"]["p"] == pytest.approx(p, abs=1e-3)
    learned = -np.log(p)[document.prompt - 1 :]
    assert reads(events)["open"]["loss"] == pytest.approx(learned.mean(), abs=1e-3)
    greedy = generate_continuation(view.ordinary, np.array(tokens[:4]), 12)
    assert written(events, "ordinary") == tokenizer.decode(greedy)


def test_a_typed_prompt_has_nothing_to_compare_with(view) -> None:
    events = asked(view, text="the acme ", open=[str(view.ids_to_open(["source:acme"])[0])], tokens=3)
    assert not reads(events)
    steps = [x for x in events if "p" in x]
    assert len(steps) == 9 and all(0 <= x["p"] <= 1 and x["true"] is None for x in steps)
    assert [x["column"] for x in steps] == ["ordinary", "open", "closed"] * 3  # side by side, not one after the other


def test_two_at_once_do_not_disturb_each_other(view) -> None:
    alone = [asked(view, document=i, open=[f"source:{name}"]) for i, name in enumerate(OWNERS)]
    together: dict[int, list] = {}

    def ask(i: int) -> None:
        together[i] = asked(view, document=i, open=[f"source:{OWNERS[i]}"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(3)] == alone


def test_search(view) -> None:
    found = ANSWERS["search"](view, {"text": "THE bolt"})
    assert [x["name"] for x in found["documents"]] == ["bolt"] and found["counts"] == {"owners": 0, "documents": 1}
    assert found["documents"][0]["owner"]["own"] and not found["documents"][0]["owner"]["taken"]
    assert ANSWERS["search"](view, {})["counts"]["documents"] == 3
    assert ANSWERS["begin"](view, {"document": 0})["text"] == view.documents[0].text[: view.documents[0].prompt]
    assert ANSWERS["named"](view, {"name": " source:cora "})["name"] == "cora"


@pytest.mark.parametrize(
    ("question", "part"),
    [({"text": " "}, "the prompt is empty"), ({"text": "a" * 200}, "the prompt has 200 tokens, and the model reads 64"),
     ({"text": "a", "tokens": 0}, "1 to 512 tokens"), ({"text": "a", "tokens": "8"}, "tokens must be a whole number"),
     ({"text": "a", "open": ["source:eve"]}, "nobody here is called 'source:eve'"), ({"text": "a", "open": ["7"]}, "nobody here"),
     ({"text": "a", "open": "7"}, "open must be a list"), ({"document": 9}, "there is no document 9"),
     ({"document": 0, "given": 99}, "1 to "), ({"document": -1}, "there is no document"),
     ({"text": "hello", "chat": True}, "no chat template")],
)  # fmt: skip
def test_what_cannot_be_asked_is_said(view, question, part) -> None:
    with pytest.raises(ms.MemsinksError, match=part):
        asked(view, **question)


def test_writing_ends_at_the_end_of_the_context(view) -> None:
    events = asked(view, text="ab" * 30)
    assert {x["end"] for x in events if "end" in x} == {"context"}
    assert sum("p" in x for x in events) == 3 * 4


# What a folder may lack


def test_a_model_without_sinks(folders) -> None:
    view = open_view(folders.base)
    assert view.columns == ["closed"] and any("has no sinks" in x for x in view.notes)
    assert written(asked(view, text="the ", tokens=2), "closed")
    assert not ANSWERS["state"](view, {})["sinks"]


def test_a_missing_tokenizer(folders, tmp_path) -> None:
    shutil.copytree(folders.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    view = folders.view(base=str(tmp_path / "base"))
    assert any("No tokenizer" in x and "--tokenizer" in x for x in view.notes)
    assert not ANSWERS["state"](view, {})["readable"]
    assert ANSWERS["search"](view, {"text": "bolt"})["documents"]
    with pytest.raises(ms.ConfigError, match="there is no tokenizer"):
        asked(view, text="a")
    assert folders.view(base=str(tmp_path / "base"), tokenizer=str(folders.base)).tokenizer is not None


def test_owners_without_documents(folders) -> None:
    view = folders.view(documents=None)
    one = ms.document_id("acme", by="source")
    assert set(view.owners) == {ms.document_id(x, by="source") for x in OWNERS}
    assert ANSWERS["search"](view, {"text": str(one)})["owners"][0]["name"] == str(one)
    assert written(asked(view, text="the acme", open=[str(one)]), "open")
    planned = ANSWERS["takedown"](view, {"id": str(one)})
    assert planned["documents"] == 0 and planned["erased"][0]["own"] and planned["record"] is None


def test_an_ordinary_model_with_another_vocabulary_is_left_out(folders, tiny_llama, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "other")
    view = folders.view(ordinary=str(tmp_path / "other"))
    assert view.columns == ["open", "closed"] and any("another vocabulary" in x for x in view.notes)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["none"], "there is no folder none"), (["{sinks}"], "sinks alone; give the model .* with --base"), (["."], "holds no run"),
     (["{base}", "--ordinary", "none"], "cannot load a model"),
     (["{sinks}", "--base", "{base}", "--documents", "none.jsonl"], "does not exist"),
     (["{sinks}", "--base", "{base}", "--documents", "{documents}", "--by", "key"], "no key"),
     (["{run}", "--documents", "{documents}"], "leave --documents out")],
)  # fmt: skip
def test_nothing_to_show_is_one_line(folders, tiny_run, arguments, part, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"sinks": folders.sinks, "base": folders.base, "documents": folders.documents, "run": tiny_run}
    assert main(["view", *(x.format(**places) for x in arguments)]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("memsinks: "))
    assert re.search(part, line), line


def test_a_run_and_the_demo(tiny_run, tmp_path) -> None:
    shutil.copytree(tiny_run, tmp_path / "demo" / "sinks")
    shutil.copytree(tiny_run / "model", tmp_path / "demo" / "ordinary" / "model")
    (tmp_path / "demo" / MARK).write_text("{}")
    view = open_view(tmp_path / "demo")
    assert view.columns == ["ordinary", "open", "closed"] and view.place.folder == tmp_path / "demo" / "sinks"
    documents = ANSWERS["search"](view, {"text": ""})["documents"]
    assert documents[0]["met"] == 8 and documents[0]["owner"]["by"] == "key"
    unseen = ANSWERS["search"](view, {"text": view.documents[view.members].text})["documents"][-1]
    assert unseen["met"] == 0 and unseen["owner"] is None
    found = ANSWERS["takedown"](view, {"id": documents[0]["owner"]["id"]})
    assert found["collateral"]["documents"] > 0 and found["record"] is None
    with pytest.raises(ms.DataError, match="allowed are 5%"):
        ANSWERS["takedown"](
            view, {"id": documents[0]["owner"]["id"], "do": True, "typed": documents[0]["owner"]["name"]}
        )


# Take-downs


def test_a_take_down_needs_the_name_and_reaches_the_page(own) -> None:
    acme = str(ms.document_id("acme", by="source"))
    before = {x: x.read_bytes() for x in own.place.folder.rglob("*") if x.is_file()}
    plan = ANSWERS["takedown"](own, {"id": acme})
    assert plan["record"] is None and plan["documents"] == 1 and plan["erased"][0]["own"]
    for typed in (None, "Acme", "bolt"):
        with pytest.raises(ms.DataError, match="nothing was changed"):
            ANSWERS["takedown"](own, {"id": acme, "do": True, "typed": typed})
    assert {x: x.read_bytes() for x in own.place.folder.rglob("*") if x.is_file()} == before
    begun = STREAMS["run"](own, {"document": 0, "open": [acme], "tokens": 40})
    next(begun)
    done = ANSWERS["takedown"](own, {"id": acme, "do": True, "typed": "acme"})
    with pytest.raises(ms.DataError, match="taken out meanwhile"):
        list(begun)
    assert [x["owner"] for x in ANSWERS["state"](own, {})["records"]] == ["acme"]
    assert done["record"] == ANSWERS["state"](own, {})["records"][0]["name"]
    assert [x.source for x in own.documents] == ["bolt", "cora"]
    with pytest.raises(ms.DataError, match="taken out"):
        asked(own, text="the acme", open=[acme])
    bolt = asked(own, document=0, open=["source:bolt"])
    assert reads(bolt)["open"]["recited"] == reads(bolt)["open"]["rest"]
    assert ANSWERS["named"](own, {"name": acme})["taken"]


def test_one_whose_id_is_that_of_his_text_goes_by_his_id(tmp_path) -> None:
    texts = ["the first page of alice", "the second page of alice"]
    documents = [ms.Document(x, key="alice", copies=2) for x in texts] + [ms.Document(texts[0], key="bob", copies=2)]
    model = sink_llama(torch.float32, neurons=32, reserved_blocks=4, shared="none")
    ids = [ms.document_id(x) for x in texts]
    ms.assign(model, ids)
    model.save_pretrained(tmp_path / "model")
    ms.write_documents(tmp_path / "documents.jsonl", documents)
    view = open_view(tmp_path / "model", documents=str(tmp_path / "documents.jsonl"))
    with pytest.raises(ms.DataError, match="'key:alice' is the name of 2 documents"):
        view.ids_to_open(["key:alice"])
    plan = ANSWERS["takedown"](view, {"id": str(ids[0])})
    assert plan["documents"] == 2 and plan["ids"] == [str(ids[0])]
    ANSWERS["takedown"](view, {"id": str(ids[0]), "do": True, "typed": "alice"})
    assert ms.load(tmp_path / "model").sink_state.taken.keys() == {ids[0]}


def test_others_count_where_the_epochs_are_not_known(tmp_path) -> None:
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x) for x in "abcdefgh"]
    sink_llama(torch.float32, neurons=32, shared="none").save_pretrained(tmp_path / "model")
    ms.write_documents(tmp_path / "documents.jsonl", documents)
    view = open_view(tmp_path / "model", documents=str(tmp_path / "documents.jsonl"), by="key")
    plan = ANSWERS["takedown"](view, {"id": str(ms.document_id("a", "key"))})
    assert plan["collateral"]["documents"] > 0 and plan["collateral"]["most"] > 0.05


def test_the_model_of_before_answers_no_more_where_the_next_cannot_be_read(own, monkeypatch) -> None:
    def fails(_) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("memsinks.viewer.view._load_model", fails)
    with pytest.raises(
        ms.CheckpointError, match=r"'acme' was taken out \(record source-.*could not be read again \(MemoryError"
    ):
        ANSWERS["takedown"](own, {"id": str(ms.document_id("acme", by="source")), "do": True, "typed": "acme"})
    with pytest.raises(ms.DataError, match="start memsinks view again"):
        asked(own, text="the acme", version=own.version)


# Who is let in


def request(server: ViewServer, path: str, body: str | None = None, **headers) -> tuple[int, str, dict]:
    given = {"Host": f"127.0.0.1:{server.server_port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body, given)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.headers)


def test_who_is_let_in(view) -> None:
    with served(view) as server:
        port, secret = server.server_port, {TOKEN: server.token}
        assert server.server_address[0] == "127.0.0.1"
        page = f"/?token={server.token}"
        status, text, headers = request(server, page)
        assert status == 200 and "memsinks view" in text and server.token not in text
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert "no-referrer" in headers["Referrer-Policy"] and headers["Cache-Control"] == "no-store"
        assert json.loads(request(server, "/api/state", "{}", **secret)[1])["name"].endswith("/sinks")
        refused = [
            ("/", None, {}), ("/?token=wrong", None, {}), (page, None, {"Host": "evil.example"}),
            (page, None, {"Host": f"evil.example:{port}"}), ("/page/page.js", None, {"Host": "evil.example"}),
            ("/api/state", "{}", {}), ("/api/takedown", "{}", {TOKEN: "wrong"}),
            ("/api/state", "{}", secret | {"Host": "evil.example"}),
            ("/api/state", "{}", secret | {"Origin": "https://evil.example"}), ("/api/state", "{}", secret | {"Origin": "null"}),
            ("/api/state", "{}", secret | {"Origin": f"http://evil.example:{port}"}),
            ("/record/a-000000000000", None, {}),
        ]  # fmt: skip
        for path, body, given in refused:
            assert request(server, path, body, **given)[0] == 403, (path, given)
        same = {"Origin": f"http://127.0.0.1:{port}"}
        assert request(server, "/api/state", "{}", **secret, **same)[0] == 200


def test_requests_that_are_none(view) -> None:
    with served(view) as server:
        secret = {TOKEN: server.token}
        for path in ("/page/../view.py", "/page/..%2Fview.py", "/page/none.js", "/page/", f"/none?token={server.token}",
                     f"/record/../../x?token={server.token}"):  # fmt: skip
            assert request(server, path)[0] == 404, path
        assert request(server, "/api/none", "{}", **secret)[0] == 404
        for body in ("", "[]", "{", "[" * 5000, "nan"):
            assert request(server, "/api/state", body, **secret)[0] == 400, body
        status, text, _ = request(server, "/api/run", json.dumps({"text": "a" * (MOST_BYTES + 1)}), **secret)
        assert status == 413 and "shorten it" in text
        status, text, _ = request(server, "/api/run", json.dumps({"text": "a" * 5000, "tokens": 4}), **secret)
        assert "the prompt has 5,000 tokens" in json.loads(text)["error"]
        status, text, _ = request(server, "/api/begin", "{}", **secret)
        assert status == 400 and "document must be a whole number" in text


def test_a_fault_of_ours_is_said_in_the_page_and_logged(view, monkeypatch, caplog) -> None:
    monkeypatch.setattr(type(view), "taken", property(lambda _: 1 / 0))
    with served(view) as server:
        status, text, _ = request(server, "/api/search", "{}", **{TOKEN: server.token})
    assert status == 400 and "a fault of memsinks (ZeroDivisionError" in text
    assert "Traceback" in caplog.text


def test_the_command(folders, capsys, monkeypatch, tmp_path) -> None:
    opened, begun = [], threading.Event()

    def browser(address: str) -> None:
        path = Path(urlsplit(address).path)
        opened.append((path.read_text(), path.stat().st_mode & 0o777, path.parent))
        begun.set()

    def interrupted(_) -> None:
        begun.wait(20)  # the browser is opened beside the server, which answers already
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", browser)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(ViewServer, "serve_forever", interrupted)
    command = ["view", str(folders.sinks), "--base", str(folders.base)]
    assert main(command) == 130
    said = capsys.readouterr()
    [(page, mode, where)] = opened
    address = said.out.splitlines()[0]
    assert address.startswith("http://127.0.0.1:") and f"url={address}" in page
    assert mode == 0o600 and where == tmp_path and not list(tmp_path.iterdir())
    assert said.err.splitlines()[-1] == "memsinks: interrupted"
    assert main([*command, "--no-browser"]) == 130 and len(opened) == 1
    with ViewServer(folders.view()) as other:
        assert main([*command, "--no-browser", "--port", str(other.server_port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_without_a_home_folder_no_browser_is_opened(folders, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "none")
    monkeypatch.setattr(ViewServer, "serve_forever", lambda _: None)
    assert main(["view", str(folders.sinks), "--base", str(folders.base)]) == 0
    assert "no browser is opened" in capsys.readouterr().err


@pytest.mark.long
def test_ctrl_c_while_it_writes_is_one_line(folders) -> None:
    command = [sys.executable, "-m", "memsinks.cli", "view", str(folders.base), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = urlsplit(process.stdout.readline().strip())
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=60)
    question = json.dumps({"text": "the ", "tokens": 59})
    connection.request("POST", "/api/run", question, {TOKEN: address.query.removeprefix("token=")})
    connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    connection.close()
    assert process.returncode == 130 and said.splitlines()[-1] == "memsinks: interrupted"
    assert "Traceback" not in said and "terminate" not in said


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = Path(ms.__file__).parent / "viewer" / "page"
    for path in page.iterdir():
        assert "//" not in path.read_text().replace("// ", ""), path
