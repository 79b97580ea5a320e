"""The screen of `browse`: a tree of modules that grows where it is opened, and beside it what is under the cursor.

Headers are all that is read before somebody asks. A tensor on which the cursor rests is read in a thread of its own,
which is told to stop when the cursor moves on; on servers it waits for a key. No text is ever taken for markup.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Footer, Input, Static, Tree

from weightops.cli.browse.panel import module_text, tensor_text
from weightops.cli.browse.reading import Counted, Reading, read
from weightops.cli.browse.subject import Subject
from weightops.cli.browse.tree import Item, ModuleTree
from weightops.cli.inspection import count
from weightops.cli.meter import human
from weightops.engine.control import Control
from weightops.errors import Interrupted, WeightopsError
from weightops.io.escape import escape

_REST_S = 0.3
"""How long the cursor rests on a tensor before it is read."""
_POLL_S = 0.2
_KEPT = 1000
"""Tensors whose readings are kept."""


class Browser(App[None]):
    """One checkpoint, or two side by side."""

    class Read(Message):
        """A tensor has been read, or could not be."""

        def __init__(self, name: str, found: Reading | str, work: Control) -> None:
            super().__init__()
            self.name, self.found, self.work = name, found, work

    class Told(Message):
        """The text of files is there."""

        def __init__(self, what: str, text: Text) -> None:
            super().__init__()
            self.what, self.text = what, text

    CSS = """
    #title { height: 1; background: $primary; color: $text; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    #tree { width: 1fr; scrollbar-size: 1 1; }
    #side { scrollbar-size: 1 1; width: 1fr; border-left: solid $primary; padding: 0 1; }
    #panel { width: 1fr; height: auto; }
    #search { display: none; dock: bottom; height: 3; }
    #found { height: 1; display: none; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "Quit"),
        Binding("ctrl+c", "leave", "Quit", show=False, priority=True),
        Binding("slash", "search", "Search", key_display="/"),
        Binding("n", "next(1)", "Next"),
        Binding("N", "next(-1)", "Previous", show=False),
        Binding("t", "show('tensor')", "Tensor"),
        Binding("c", "show('config')", "Config"),
        Binding("m", "show('metadata')", "Files"),
        Binding("s", "read", "Read"),
        Binding("z", "fold", "Close all"),
        Binding("escape", "end_search", "End search", show=False),
    ]
    TITLE = "weightops browse"
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, subject: Subject, control: Control) -> None:
        super().__init__()
        self._subject, self._control = subject, control
        self._readings: OrderedDict[str, Reading | str] = OrderedDict()
        self._modules: dict[int, Text] = {}
        """What is said of modules, by the lines of the tree, which last as long."""
        self._work: Control | None = None
        """That of the thread which reads, if one does."""
        self._counted = Counted()
        self._rest: Timer | None = None
        self._matches: list[str] = []
        self._shown = "tensor"

    def compose(self) -> ComposeResult:
        """The widgets, from the top down."""
        yield Static(self._title(), id="title", markup=False)
        with Horizontal():
            yield ModuleTree(self._subject)
            with VerticalScroll(id="side"):
                yield Static("", id="panel", markup=False)
        yield Static("", id="found", markup=False)
        yield Input(placeholder="part of a name, or a glob", id="search")
        yield Footer()

    def _title(self) -> Text:
        sides = self._subject.sides
        if len(sides) > 1:
            return Text("   ".join(f"{letter} {side.shown}" for letter, side in zip("AB", sides, strict=True)))
        found = sides[0].inspection
        sizes = f"{len(found.tensors):,} tensors, {count(found.parameters)} parameters, {human(found.nbytes)}"
        return Text(f"{sides[0].shown}: {sizes}")

    def on_mount(self) -> None:
        """Open the first level, and look now and then whether somebody wants the program to end."""
        self._tree.root.expand()
        self._tree.focus()
        self.set_interval(_POLL_S, self._poll)

    @property
    def _tree(self) -> ModuleTree:
        return self.query_one("#tree", ModuleTree)

    def _poll(self) -> None:
        try:
            self._control.check()
        except Interrupted as error:
            self.exit(return_code=error.exit_code)
        if self._work is not None:
            self._refresh()

    async def action_leave(self) -> None:
        """End, with the thread that reads."""
        self._stop_reading()
        self.exit()

    def on_unmount(self) -> None:
        """Leave no thread behind that would go on reading, or wait for a server."""
        self._stop_reading()
        self._control.cancel()

    # the panel

    def on_tree_node_highlighted(self, event: Tree.NodeHighlighted[Item]) -> None:
        """The cursor has moved: stop what is read, and begin when it rests."""
        self._stop_reading()
        self._shown = "tensor"
        self._refresh()
        item = event.node.data
        name = item.name if item is not None else None
        if name is not None and name not in self._readings and not self._on_servers(name):
            self._rest = self.set_timer(_REST_S, self.action_read)

    def _on_servers(self, name: str) -> int:
        """The bytes of a tensor that would come over the network; of a pair twice, for it is measured too."""
        row = self._subject.rows[name]
        tensors = (member.tensor for member in row.members if member is not None)
        ops = {node: node.op for tensor in tensors for node in tensor.walk()}.values()
        found = sum(op.extent[1] - op.extent[0] for op in ops if op.source is not None and op.source.is_on_server)
        return found if row.pair is None else 2 * found

    def _refresh(self) -> None:
        panel, item = self.query_one("#panel", Static), self._tree.item
        if self._shown != "tensor" or item is None:
            return
        width = max(20, self.query_one("#side").size.width - 4)
        if item.name is not None:
            panel.update(tensor_text(self._subject, item.name, self._state(item.name), width))
        elif item.module is not None:
            if id(item) not in self._modules:
                self._modules[id(item)] = module_text(self._subject, item.path, list(item.module.names()))
            panel.update(self._modules[id(item)])
        else:
            panel.update("")

    def _state(self, name: str) -> Reading | str:
        """What has been read of a tensor, or how far that is."""
        known = self._readings.get(name)
        if known is not None:
            return known
        if self._work is not None:
            return f"{self._counted.what}: {self._counted.percent} % of {human(self._counted.total)}"
        fetched = self._on_servers(name)
        return f"s reads it: {human(fetched)} over the network" if fetched else ""

    def on_resize(self) -> None:
        """Draw bars anew for another width."""
        self.call_after_refresh(self._refresh)

    def action_read(self) -> None:
        """Read the tensor under the cursor."""
        item = self._tree.item
        if item is None or item.name is None or item.name in self._readings or self._work is not None:
            return
        members = self._subject.rows[item.name].members
        self._counted = Counted(sum(member.tensor.nbytes for member in members if member is not None))
        work = self._work = Control(self._counted, parent=self._control)
        name = item.name
        self.run_worker(lambda: self._read(name, work), thread=True, exit_on_error=False, group="read")
        self._refresh()

    def _read(self, name: str, work: Control) -> None:
        """In a thread: everything that is to be shown of a tensor."""
        found: Reading | str
        try:
            found = read(name, self._subject.rows[name], self._subject.alignment, work)
        except Interrupted:
            return
        except (WeightopsError, OSError, MemoryError) as error:
            found = f"cannot be read: {error}"
        self.post_message(self.Read(name, found, work))

    def on_browser_read(self, message: Browser.Read) -> None:
        """Keep what has been read, and show it."""
        self._readings[message.name] = message.found
        while len(self._readings) > _KEPT:
            self._readings.popitem(last=False)
        if self._work is message.work:
            self._work = None
        self._refresh()

    def _stop_reading(self) -> None:
        if self._rest is not None:
            self._rest.stop()
            self._rest = None
        if self._work is not None:
            self._work.stop()
            self._work = None

    def action_show(self, what: str) -> None:
        """Show the tensor, the config, or files and metadata."""
        self._shown = what
        panel = self.query_one("#panel", Static)
        self.query_one("#side", VerticalScroll).scroll_home(animate=False)
        if what == "tensor":
            self._refresh()
            return
        panel.update("reading …")
        self.run_worker(lambda: self._tell(what), thread=True, exit_on_error=False, group="files", exclusive=True)

    def _tell(self, what: str) -> None:
        """In a thread, because files may be on servers: config, or files and metadata."""
        try:
            if what == "config":
                lines = list(self._subject.config())
            else:
                sides = [side.metadata() for side in self._subject.sides]
                lines = [line for side in sides for line in (*side, "")]
        except (WeightopsError, OSError) as error:
            lines = [str(error)]
        text = Text()
        for line in lines:
            changed = {"+": "green", "-": "red"}.get(line[:1], "") if what == "config" else ""
            text.append(f"{line}\n", changed)
        self.post_message(self.Told(what, text))

    def on_browser_told(self, message: Browser.Told) -> None:
        """Show a text, if it is still wanted."""
        if self._shown == message.what:
            self.query_one("#panel", Static).update(message.text)

    def action_fold(self) -> None:
        """Close everything but the first level of the tree."""
        self._tree.fold()

    # search

    def action_search(self) -> None:
        """Ask for a part of a name."""
        field = self.query_one("#search", Input)
        field.display = True
        field.value = ""
        field.focus()

    def action_end_search(self) -> None:
        """Put the search away."""
        self.query_one("#search", Input).display = False
        self.query_one("#found", Static).display = False
        self._tree.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Count what matches while somebody types."""
        self._matches = self._subject.find(event.value)
        self._say(f"{len(self._matches):,} tensors match" if event.value else "")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go to the first that matches."""
        self.query_one("#search", Input).display = False
        self._tree.focus()
        if self._matches:
            self._go(0)
        elif event.value:
            self._say(f"no tensor matches {escape(event.value)}")

    def action_next(self, step: int) -> None:
        """Go to the next tensor that matches, or the one before."""
        if not self._matches:
            self._say("nothing to go to: / searches")
            return
        item = self._tree.item
        at = self._matches.index(item.name) if item is not None and item.name in self._matches else -(step > 0)
        self._go((at + step) % len(self._matches))

    def _go(self, number: int) -> None:
        name = self._matches[number]
        self._say(f"{number + 1:,} of {len(self._matches):,}: n is the next, N the one before")
        self._tree.go(name)

    def _say(self, text: str) -> None:
        line = self.query_one("#found", Static)
        line.display = bool(text)
        line.update(text)
