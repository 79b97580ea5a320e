"""Publishing to a hub: one commit of what was verified, nothing sent twice, and refusals that leave nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Fault, status
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from publishing import (
    PLACE,
    TOKEN,
    WEIGHTS,
    interrupted_by,
    listed,
    make_model,
    publish,
    save_manifest,
    save_signature,
)
from safetensors.torch import save_file
from support import write_checkpoint
from writable_hub import WritableHub

import weightops
from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    Differs,
    NetworkFailed,
    NoRoom,
    SourceMissing,
    UsageError,
    WeightopsError,
)

GIT = ".gitattributes"


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with WritableHub(token=TOKEN, chunk_nbytes=100_000) as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def there(hub: WritableHub) -> dict[str, bytes]:
    return {name: data for name, data in hub.files("org/model").items() if name != GIT}


def writes(hub: WritableHub) -> list[str]:
    """The calls that change something."""
    return [each.path for each in hub.log if each.method != "GET" and "/preupload/" not in each.path]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_the_stand_in_is_one_that_huggingface_hub_can_write_to(
    hub: WritableHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(hub.endpoint, token=TOKEN)
    api.create_repo("org/model", private=True)
    files = listed(model)
    added = [CommitOperationAdd(name, str(model / name)) for name in files]
    head = api.create_commit("org/model", [*added, CommitOperationDelete(GIT)], commit_message="theirs").oid
    assert hub.files("org/model") == files
    assert hub.commits == [
        {"message": "theirs", "parent": hub.commits[0]["parent"], "names": [*files, GIT]},
    ]
    assert api.repo_info("org/model").sha == head
    assert publish(hub, model).version == head


def test_a_model_is_there_in_one_commit_and_then_nothing_is_left_to_send(hub: WritableHub, model: Path) -> None:
    made = publish(hub, model, create=True, message="first")
    assert there(hub) == listed(model)
    assert [each["message"] for each in hub.commits] == ["first"]
    assert hub.private == {"org/model": True}
    assert (made.created, made.visibility, made.owner) == (True, "private", "org (me is a member)")
    assert made.version == hub.repos["org/model"]["main"][0]
    assert made.not_sent == ("notes.txt",)
    digest = hashlib.sha256((model / WEIGHTS[0]).read_bytes()).hexdigest()
    proofs = {file.name: file.proof for file in made.files}
    assert proofs[WEIGHTS[0]] == f"the hub lists its SHA-256, {digest}"
    assert proofs["README.md"].startswith("the hub lists its SHA-1 of git, ")
    assert made.sent_nbytes == made.nbytes == sum(map(len, listed(model).values()))

    hub.log.clear()
    again = publish(hub, model)
    assert (again.sent_nbytes, again.version, writes(hub)) == (0, made.version, [])
    assert {file.status for file in again.files} == {"there"}


def test_only_what_differs_is_sent(hub: WritableHub, model: Path) -> None:
    publish(hub, model, create=True)
    before = dict(hub.received)
    (model / "README.md").write_text("# another title\n")
    save_manifest(model)
    made = publish(hub, model)
    assert hub.commits[-1]["names"] == ["README.md", "weightops-manifest.json"]
    assert hub.received == before
    assert [file.name for file in made.files if file.status == "sent"] == hub.commits[-1]["names"]


def test_equal_files_are_one_content(hub: WritableHub, model: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        (model / name).write_bytes(bytes(200_000))
    save_manifest(model)
    publish(hub, model, create=True)
    assert hub.received[hashlib.sha256(bytes(200_000)).hexdigest()] == 200_000


@pytest.mark.parametrize("chunk_nbytes", [None, 100_000])
def test_an_interrupted_run_sends_no_file_again_that_has_arrived(
    hub: WritableHub, model: Path, chunk_nbytes: int | None
) -> None:
    hub.chunk_nbytes = chunk_nbytes
    assert interrupted_by(hub, model, lambda oid, nbytes: len(hub.contents) == 1 and nbytes > 0)
    assert there(hub) == {}
    assert hub.commits == []
    arrived = {oid: hub.received[oid] for oid in hub.contents}
    publish(hub, model)
    assert there(hub) == listed(model)
    assert len(hub.commits) == 1
    assert {oid: hub.received[oid] for oid in arrived} == arrived == {oid: len(hub.contents[oid]) for oid in arrived}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: WritableHub, model: Path) -> None:
    hub.faults["commit"] = [Fault("drop")]
    made = publish(hub, model, create=True)
    assert made.version == hub.repos["org/model"]["main"][0]
    assert len(hub.commits) == 1


def test_what_fails_for_a_while_is_tried_again(hub: WritableHub, model: Path) -> None:
    for key in ("whoami", "create", "preupload", "batch", "put", "complete", "verify", "commit", "api"):
        hub.faults[key] = [status(503)]
    hub.faults["create"] = []
    publish(hub, model, create=True)
    assert there(hub) == listed(model)


def test_a_branch_that_moves_meanwhile_is_left_as_it_is(hub: WritableHub, model: Path) -> None:
    publish(hub, model, create=True)
    files = hub.repos["org/model"]["main"][1]
    save_file({"b": torch.ones(60_000)}, model / WEIGHTS[1])
    save_manifest(model)

    def intrude(oid: str, nbytes: int) -> None:
        if len(hub.commits) == 1:
            hub.commit("org/model", "main", files, "theirs", [])

    hub.on_upload = intrude
    with pytest.raises(Differs, match="main is not at"):
        publish(hub, model)
    assert [each["message"] for each in hub.commits] == ["Publish org/model with weightops", "theirs"]
    publish(hub, model)
    assert there(hub) == listed(model)


def test_files_that_the_folder_lacks_stay_unless_they_are_to_be_deleted(hub: WritableHub, model: Path) -> None:
    publish(hub, model, create=True)
    (model / "old.txt").write_text("old")
    save_manifest(model)
    publish(hub, model)
    (model / "old.txt").unlink()
    save_manifest(model)
    kept = publish(hub, model)
    assert (kept.kept, kept.deleted) == (("old.txt",), ())
    assert "old.txt" in there(hub)
    shown = publish(hub, model, delete=True, dry_run=True)
    assert (shown.kept, shown.deleted) == ((), ("old.txt",))
    assert "old.txt" in there(hub)
    publish(hub, model, delete=True)
    assert there(hub).keys() == listed(model).keys()
    assert GIT in hub.files("org/model")


def test_a_dry_run_changes_nothing(hub: WritableHub, model: Path) -> None:
    found = publish(hub, model, create=True, public=True, dry_run=True)
    assert (found.created, found.visibility, found.owner) == (True, "public", "org (me is a member)")
    assert found.sent_nbytes == found.nbytes
    assert {file.status for file in found.files} == {"to send"}
    assert (writes(hub), hub.repos) == ([], {})


def test_only_who_asks_for_it_makes_a_public_repository(hub: WritableHub, model: Path) -> None:
    assert publish(hub, model, create=True, public=True).visibility == "public"
    assert hub.private == {"org/model": False}
    hub.private["org/model"] = True
    (warning,) = publish(hub, model, create=True, public=True).warnings
    assert warning == "the place is there already, and stays private"


def test_the_token_goes_to_the_hub_alone(hub: WritableHub, model: Path) -> None:
    publish(hub, model, create=True)
    told = {each.server for each in hub.log if TOKEN in str(each.headers)}
    assert (told, {each.server for each in hub.log}) == ({"hub"}, {"hub", "cdn"})


def test_a_branch(hub: WritableHub, model: Path) -> None:
    hub.add("org/model", {"README.md": b""})
    with pytest.raises(SourceMissing, match="has no branch v2"):
        publish(hub, model, f"{PLACE}@v2")
    hub.add("org/model", {"README.md": b""}, revision="v2")
    made = publish(hub, model, f"{PLACE}@v2")
    assert made.destination == f"{PLACE}@v2"
    assert hub.files("org/model", "v2") == listed(model)
    assert there(hub) == {"README.md": b""}


def damage(model: Path) -> None:
    data = bytearray((model / WEIGHTS[1]).read_bytes())
    data[-1] ^= 1
    (model / WEIGHTS[1]).write_bytes(data)


def shorten(model: Path) -> None:
    (model / WEIGHTS[0]).write_bytes((model / WEIGHTS[0]).read_bytes()[:-4])


def take_away(model: Path) -> None:
    (model / WEIGHTS[0]).unlink()
    (model / "tokenizer/empty.txt").unlink()


def spoil(model: Path) -> None:
    write_checkpoint(model, {"a": torch.tensor([1.0, float("nan")])})
    (model / WEIGHTS[1]).unlink()
    save_manifest(model)


def sign_other(model: Path) -> None:
    save_signature(model)
    (model / "README.md").write_text("# more\n")
    save_manifest(model)
    (model / "notes.txt").unlink()


def sign_hidden(model: Path) -> None:
    (model / ".hidden").write_text("")
    save_signature(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage, r"other.safetensors has the xxh3_128 \w+, expected"),
        (shorten, r"model.safetensors has \d+ bytes, expected"),
        (take_away, r"is missing, and 1 more are not as it lists them"),
        (spoil, r"is broken, and not published: .*NaN"),
        (sign_other, r"model.sig: does not sign README.md as it is"),
        (sign_hidden, r"model.sig: signs .hidden, which is not published"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_damaged_or_broken_is_not_sent(
    hub: WritableHub, model: Path, change: Callable[[Path], None], said: str
) -> None:
    change(model)
    with pytest.raises(Differs, match=said):
        publish(hub, model, create=True)
    assert writes(hub) == []


def test_a_signature_of_what_is_published_goes_along(hub: WritableHub, model: Path, tmp_path: Path) -> None:
    save_signature(model)
    made = publish(hub, model, create=True)
    assert "model.sig" in {file.name for file in made.files}
    folder = tmp_path / "got"
    for name, data in there(hub).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    report = weightops.verify(folder, signature=folder / "model.sig", key=tmp_path / "signer.pub")
    assert report.verdict


def test_a_folder_without_a_card_is_given_one(hub: WritableHub, tmp_path: Path) -> None:
    for name, value in (("raw", 1.0), ("tuned", 2.0)):
        write_checkpoint(tmp_path / name, {"a": torch.full((64,), value)})
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta")
    made = publish(hub, tmp_path / "delta", create=True)
    assert made.warnings == ("the folder has no README.md: one is published that is made from its manifest",)
    card = there(hub)["README.md"].decode()
    assert "weightops download hf://org/model --out ./model" in card
    assert "\nweightops verify ./model\n" in card
    assert "weightops recover --raw raw --diff ./model --out ./recovered" in card
    again = publish(hub, tmp_path / "delta", delete=True)
    assert (again.sent_nbytes, again.kept, again.deleted) == (0, ("README.md",), ())


def test_a_card_that_was_edited_there_stays(hub: WritableHub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"a": torch.ones(4)})
    save_manifest(tmp_path / "model")
    hub.add("org/model", {"README.md": b"# edited there\n"})
    publish(hub, tmp_path / "model", delete=True)
    assert there(hub)["README.md"] == b"# edited there\n"


def gone(hub: WritableHub) -> None:
    """Nothing is done: there is no such repository."""


def full(hub: WritableHub) -> None:
    hub.add("org/model", {})
    hub.room_nbytes = 1000


def refusing(key: str, code: int, said: str = "") -> Callable[[WritableHub], None]:
    def change(hub: WritableHub) -> None:
        hub.add("org/model", {})
        headers = {"Content-Type": "application/json"}
        hub.always[key] = Fault("status", code, body=json.dumps({"error": said}).encode(), headers=headers)

    change.__name__ = f"{key}-{code}"
    return change


def ignoring(hub: WritableHub) -> None:
    hub.add("org/model", {})
    hub.ignored = {WEIGHTS[0]}


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (gone, SourceMissing, "there is no such place, or you may not see it"),
        (full, NoRoom, r"\.safetensors: the hub does not take it \(status 507, Storage limit reached\)"),
        (refusing("commit", 413, "too large"), NoRoom, "too large"),
        (refusing("batch", 500), NetworkFailed, "gave up after 3 attempts"),
        (refusing("put", 403, "Request has expired"), AuthenticationFailed, "Request has expired"),
        (refusing("commit", 403, "You need write rights"), AuthenticationFailed, "You need write rights"),
        (refusing("whoami", 401, "Invalid token"), AuthenticationFailed, "Invalid token"),
        (ignoring, UsageError, "its .gitignore leaves out model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_hub_refuses_is_said_in_a_sentence_and_changes_nothing(
    hub: WritableHub, model: Path, change: Callable[[WritableHub], None], kind: type[WeightopsError], said: str
) -> None:
    change(hub)
    with pytest.raises(kind, match=said) as raised:
        publish(hub, model)
    assert type(raised.value) is kind
    assert TOKEN not in str(raised.value)
    assert "Signature" not in str(raised.value)
    assert hub.commits == []


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"chunk_size": "0", "1": "http://127.0.0.1/"}, "wants 0 bytes a part, and gives 1 addresses"),
        ({"chunk_size": "100000", "1": "http://127.0.0.1/"}, "gives 1 addresses for"),
        ({"chunk_size": "9" * 40, "1": "http://127.0.0.1/"}, "gives 1 addresses for"),
        ({"chunk_size": "1000000", "1": "ftp://127.0.0.1/"}, "not followed, expected http or https"),
    ],
)
def test_addresses_that_make_no_sense_are_sent_nothing(
    hub: WritableHub, model: Path, header: dict[str, str], said: str
) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        for each in answer["objects"]:
            each["actions"]["upload"]["header"] = header
        return answer

    hub.change_batch = change
    with pytest.raises(CorruptInput, match=said):
        publish(hub, model, create=True)


def test_an_answer_about_another_content_is_refused(hub: WritableHub, model: Path) -> None:
    hub.change_batch = lambda answer: {"objects": [{**each, "oid": "0" * 64} for each in answer["objects"]]}
    with pytest.raises(CorruptInput, match="the hub answers for another content"):
        publish(hub, model, create=True)


def test_a_hub_that_lists_something_else_afterwards_is_not_believed(hub: WritableHub, model: Path) -> None:
    publish(hub, model, create=True)
    commit = hub.commit
    hub.commit = lambda repo, rev, files, *rest: commit(repo, rev, {**files, "README.md": files[GIT]}, *rest)
    (model / "README.md").write_text("# new\n")
    save_manifest(model)
    with pytest.raises(Differs, match=r"README.md is not as it was sent"):
        publish(hub, model)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"place": "org/model"}, UsageError, "nothing can be published there"),
        ({"place": "https://example.org/x"}, UsageError, "nothing can be published there"),
        ({"place": f"{PLACE}@{'a' * 40}"}, UsageError, "a commit never changes"),
        ({"public": True}, UsageError, "who can see a place is decided when it is made"),
        ({"token": None, "create": True}, AuthenticationFailed, "needs a token, and there is none"),
        ({"token": "hf_wrong", "create": True}, AuthenticationFailed, "Invalid credentials"),
        ({"place": "hf://stranger/model", "create": True}, AuthenticationFailed, "rights to create a model"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hub: WritableHub, model: Path, options: dict[str, Any], kind: type[WeightopsError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        publish(hub, model, **options)
    assert hub.repos == {}


def test_a_folder_that_says_nothing_of_itself_is_not_published(hub: WritableHub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", {"a": torch.ones(2)})
    with pytest.raises(SourceMissing, match=r"holds no weightops-manifest\.json"):
        publish(hub, tmp_path / "plain", create=True)
    with pytest.raises(SourceMissing, match="no such folder"):
        publish(hub, tmp_path / "none", create=True)
    with pytest.raises(UsageError, match="is a file"):
        publish(hub, tmp_path / "plain/model.safetensors", create=True)


def test_a_manifest_without_digests_proves_nothing(hub: WritableHub, model: Path) -> None:
    path = model / "weightops-manifest.json"
    document = json.loads(path.read_bytes())
    document["files"][WEIGHTS[0]]["digests"] = {"crc3": "00"}
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptInput, match=r"has no digest of model\.safetensors that is known here"):
        publish(hub, model, create=True)


def test_a_file_that_changes_while_it_is_sent_is_not_committed(hub: WritableHub, model: Path) -> None:
    def touch(oid: str, nbytes: int) -> None:
        (model / WEIGHTS[0]).touch()
        (model / WEIGHTS[1]).touch()

    hub.on_upload = touch
    with pytest.raises(CorruptInput, match="changed after it was verified"):
        publish(hub, model, create=True)
    assert hub.commits == []
