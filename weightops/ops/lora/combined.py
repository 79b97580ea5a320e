"""The factors of one LoRA that is made of several: exact from their factors, or as peft approximates them.

With A `[r, in]` and B `[out, r]` of each, weights w and scales s, what is wanted is the sum of w s B A. It is the
product of the Bs side by side with the As, times w s, one below the other: two thin matrices of the sum of the ranks,
which is `cat`. `svd` is the best of a lower rank, by the same matrices: with B = Q R and A^T = P S, the decomposition
of R S^T, no larger than that sum, gives that of B A, and neither the product nor Q or P is ever made. Other methods are
peft's (`weightops.ops.lora.arithmetic`): on A and on B apart, with weights of sqrt |w s| and the sign on A, which is
not the sum, because every B then meets every A; or on the whole products (`_svd`), which are decomposed by their Gram
matrix.

Results have a scale of 1. Singular values are split evenly between A and B; of each pair of singular vectors, that of A
is turned so that its element of the largest size is positive. Decompositions are made in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import matmul
from weightops.ops.lora.arithmetic import Rule, SignVote, combine
from weightops.ops.lora.product import wide_values
from weightops.ops.lora.spectrum import triangle
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""peft's names."""
METHODS: tuple[str, ...] = get_args(Method)
_EXACT = ("cat", "svd")
_GRAM_ROWS = 1024
_NOTHING = 1e-14
"""Singular values below this share of the norms of the factors are rounding errors of float64."""


def makes_products(method: str) -> bool:
    """Whether a method needs whole products of factors."""
    return method.endswith("_svd")


def is_of_one_rank(method: str) -> bool:
    """Whether a method adds up factors as they are, which must be of one rank then."""
    return method not in _EXACT and not makes_products(method)


class CombinedFactor(Op, frozen=True):
    """A (`part` "a", [rank, in]) or B ("b", [out, rank]) of adapters combined, in float32.

    Inputs are A and B of each, `terms` their weights w and scales s. `rank` is that of the result, for each of
    `experts` (see `weightops.ops.lora.product.Part`). `places` are those of the adapters in the list, on which random
    masks depend, with `seed` and `label`; that names the module in errors and notes. Both factors are computed at once
    and kept until those of another module are asked for. Then it is noted what share of the exact sum the result is off
    (`error`, of Frobenius norms), the `norm` of that sum, and the `rank`.
    """

    method: Method
    terms: tuple[tuple[float, float], ...]
    rank: int
    part: Literal["a", "b"]
    label: str
    experts: int = 1
    density: float = 1.0
    vote: SignVote = "total"
    seed: int = 0
    places: tuple[int, ...] = ()
    held: int = 0
    """Memory for the module while it is in work, in bytes."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        pairs = list(zip(inputs[::2], inputs[1::2], strict=True))
        if len(pairs) != len(self.terms):
            raise UsageError(f"{len(pairs)} pairs of factors with {len(self.terms)} weights")
        (a, b), *_ = pairs
        for other_a, other_b in pairs:
            is_pair = min(len(other_a.shape), len(other_b.shape)) > 1 and other_a.shape[0] == other_b.shape[1] > 0
            if not is_pair or math.prod(other_b.shape[2:]) != 1 or other_a.shape[0] % self.experts:
                raise IncompatibleInputs(f"the factors {other_a} and {other_b} have no product")
            if (other_a.shape[1:], other_b.shape[0]) != (a.shape[1:], b.shape[0]):
                raise IncompatibleInputs(f"factors {a} and {b} cannot be added to {other_a} and {other_b}")
        rank = self.rank * self.experts
        shape = (rank, *a.shape[1:]) if self.part == "a" else (b.shape[0], rank, *b.shape[2:])
        return TensorSpec(DType.F32, shape)

    def grain(self, tensor: LazyTensor) -> int:
        return DType.F32.itemsize

    @property
    def scratch_nbytes(self) -> int:
        return self.held

    def held_nbytes(self, *inputs: TensorSpec) -> int:
        """Memory that the module takes while it is in work."""
        out, width = inputs[1].shape[0], math.prod(inputs[0].shape[1:])
        ranks = sum(spec.shape[0] for spec in inputs[::2]) // self.experts
        factors = sum(spec.numel for spec in inputs) * 4 + (out + width) * (ranks * 16 + self.rank * self.experts * 4)
        if not makes_products(self.method):
            return factors
        return factors + out * width * 4 * 5 + min(out, width) ** 2 * 8 * 4

    def multiplications(self, *inputs: TensorSpec) -> int:
        """How many are to be made, to a factor of two."""
        out, width = inputs[1].shape[0], math.prod(inputs[0].shape[1:])
        if not makes_products(self.method):
            return sum(spec.numel * spec.shape[0] for spec in inputs[::2])
        short = min(out, width)
        products = sum(spec.shape[0] for spec in inputs[::2]) * out * width
        return products + self.experts * (out * width * short + 9 * short**3)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        key = (msgspec.structs.replace(self, part="a"), tensor.inputs)
        known, a, b = read.running.get(CombinedFactor, (None, None, None))
        if known != key:
            read.running.pop(CombinedFactor, None)
            del a, b
            a, b, (off, norm) = self._factors(tensor, read)
            read.running[CombinedFactor] = (key, a, b)
            if self.method != "cat":
                error = {"error": off / norm} if norm else {}
                read.notes[tensor] = self.label, {**error, "norm": norm, "rank": float(self.rank)}
        whole = (a if self.part == "a" else b).reshape(-1)
        first = start // DType.F32.itemsize
        out[:] = memoryview(whole[first : first + len(out) // DType.F32.itemsize]).cast("B")

    def _factors(self, tensor: LazyTensor, read: Evaluator) -> tuple[NDArray[Any], NDArray[Any], Any]:
        import numpy as np

        given = [wide_values(each, DType.F32, read) for each in tensor.inputs]
        if not all(np.isfinite(values).all() for values in given):
            raise CorruptInput(f"{escape(self.label)}: the factors hold NaN or infinities, and cannot be combined")
        width = math.prod(tensor.inputs[0].spec.shape[1:])
        rows = tensor.inputs[1].spec.shape[0]
        lefts = [values.reshape(self.experts, -1, width) for values in given[::2]]
        rights = [values.reshape(rows, -1, self.experts) for values in given[1::2]]
        a = np.empty((self.experts, self.rank, width), np.float32)
        b = np.empty((rows, self.rank, self.experts), np.float32)
        squares = np.zeros(2)
        for i in range(self.experts):
            own = [(one[i], np.ascontiguousarray(two[:, :, i])) for one, two in zip(lefts, rights, strict=True)]
            a[i], b[:, :, i], known = self._of_expert(own, i)
            squares += self._distance(own, a[i], b[:, :, i]) if known is None else known
        return a, b, np.sqrt(squares).tolist()

    def _of_expert(
        self, pairs: list[tuple[NDArray[Any], NDArray[Any]]], expert: int
    ) -> tuple[NDArray[Any], NDArray[Any], tuple[float, float] | None]:
        """A and B, and where that is known ||result - exact sum||^2 and ||exact sum||^2."""
        import numpy as np

        if self.method in _EXACT:
            a, b = _stacked(pairs, [weight * scale for weight, scale in self.terms])
            if self.method == "cat":
                return a.astype(np.float32), b.astype(np.float32), (0.0, 0.0)
            return _truncated(a, b, self.rank)
        rule = cast(Rule, self.method.removesuffix("_svd"))
        key = f"{self.seed}\0{self.label}\0{expert}\0"

        def combined(tensor: Any, weights: list[float], name: str) -> NDArray[Any]:
            return combine(
                rule, tensor, weights, density=self.density, vote=self.vote, key=key + name, places=self.places
            )

        if not makes_products(self.method):
            strengths = [weight * scale for weight, scale in self.terms]
            roots = [math.sqrt(abs(strength)) for strength in strengths]
            signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
            a = combined(lambda i: pairs[i][0].copy(), signed, "lora_A")
            return a, combined(lambda i: pairs[i][1].copy(), roots, "lora_B"), None

        def product(i: int) -> NDArray[Any]:
            left, right = pairs[i]
            found = np.empty((len(right), left.shape[1]), np.float32)
            matmul(found, right, left)
            found *= np.float32(self.terms[i][1])
            return found

        return *_decomposed(combined(product, [weight for weight, _ in self.terms], "product"), self.rank), None

    def _distance(
        self, pairs: list[tuple[NDArray[Any], NDArray[Any]]], a: NDArray[Any], b: NDArray[Any]
    ) -> tuple[float, float]:
        """||result - exact sum||^2 and ||exact sum||^2, from factors alone."""
        import numpy as np

        exact = _stacked(pairs, [weight * scale for weight, scale in self.terms])
        both = np.concatenate([exact[0], a]), np.concatenate([exact[1], -b.astype(np.float64)], axis=1)
        return _square(*both), _square(*exact)


def combined_pair(how: CombinedFactor, inputs: Sequence[LazyTensor]) -> tuple[LazyTensor, LazyTensor]:
    """A and B, combined from `inputs`; raises `IncompatibleInputs` for factors that do not fit each other."""
    held = msgspec.structs.replace(how, held=how.held_nbytes(*(each.spec for each in inputs)))
    a, b = (LazyTensor.make(msgspec.structs.replace(held, part=part), *inputs) for part in ("a", "b"))
    return a, b


_Factors = tuple["NDArray[Any]", "NDArray[Any]"]


def _stacked(pairs: list[tuple[NDArray[Any], NDArray[Any]]], strengths: list[float]) -> _Factors:
    """A and B in float64 whose product is the sum of all, each times its strength."""
    import numpy as np

    rows = [a.astype(np.float64) * strength for (a, _), strength in zip(pairs, strengths, strict=True)]
    return np.concatenate(rows), np.concatenate([b for _, b in pairs], axis=1).astype(np.float64)


def _square(a: NDArray[Any], b: NDArray[Any]) -> float:
    """||B A||^2 by the Gram matrices of both: at least to 1e-16 of the largest terms."""
    import numpy as np

    return max(0.0, float(np.vdot(b.T @ b, a @ a.T)))


def _truncated(a: NDArray[Any], b: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any], tuple[float, float]]:
    """The best approximation of B A of that rank, as factors, and the squares of what it leaves out and of all."""
    import numpy as np

    left, right = triangle(b), triangle(a.T)
    turn, values, other = np.linalg.svd(left @ right.T)
    values[values <= np.linalg.norm(left) * np.linalg.norm(right) * _NOTHING] = 0
    kept = min(rank, int((values > 0).sum()))
    roots = np.sqrt(values[:kept])
    found_a, found_b = np.zeros((rank, a.shape[1])), np.zeros((len(b), rank))
    # V^T = S^-1 U^T B A, and U S = B A V; U and V being those of R and S^T, turned by Q and P.
    found_a[:kept] = (turn[:, :kept].T @ left / roots[:, None]) @ a
    found_b[:, :kept] = b @ (right.T @ other[:kept].T / roots)
    squares = values * values
    return *_turned(found_a, found_b), (float(squares[kept:].sum()), float(squares.sum()))


def _decomposed(matrix: NDArray[Any], rank: int) -> _Factors:
    """The best approximation of a matrix of float32 of that rank, as factors."""
    import numpy as np

    is_wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.T if is_wide else matrix
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    blocks = [tall[top : top + _GRAM_ROWS] for top in range(0, len(tall), _GRAM_ROWS)]
    for block in blocks:
        wide = block.astype(np.float64)
        gram += wide.T @ wide
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    image = np.concatenate([block.astype(np.float64) @ vectors for block in blocks])
    values = np.sqrt(np.einsum("ij,ij->j", image, image))
    roots = np.sqrt(values)
    image /= np.where(roots > 0, roots, 1)
    vectors = vectors * roots
    return _turned(image.T, vectors) if is_wide else _turned(vectors.T, image)


def _turned(a: NDArray[Any], b: NDArray[Any]) -> _Factors:
    """The same with signs that do not depend on the library that decomposed, in float32."""
    import numpy as np

    largest = a[np.arange(len(a)), np.abs(a).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    return (a * signs[:, None]).astype(np.float32), (b * signs).astype(np.float32)


class WeightedSum(Op, frozen=True):
    """The sum of its inputs, each times its weight: added up in float64, in float32; for small tensors."""

    weights: tuple[float, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        odd = next((each for each in inputs if each.shape != inputs[0].shape), None)
        if odd is not None:
            raise IncompatibleInputs(f"cannot add {odd} to {inputs[0]}")
        return TensorSpec(DType.F32, inputs[0].shape)

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        total = np.zeros(tensor.spec.numel)
        for each, weight in zip(tensor.inputs, self.weights, strict=True):
            total += wide_values(each, DType.F64, read) * weight
        np.frombuffer(out, np.float32)[:] = total
