"""What every registered transform promises of its bases; those that run beside the kernel have `input` and `output`."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.contracts import Aim, Basis, QuantizedWeight, Transform
from mezzotint.core.statistics import Accumulator
from mezzotint.registry import TRANSFORMS
from mezzotint.testing import strategies
from mezzotint.testing.problems import OPTIONAL_SUMS, Snapshot, make_problem, make_tokens, make_weight

F64 = (torch.float64,)
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
# what is folded into the model leaves nothing to store, and nothing to do when it runs
stored_transform = pytest.mark.parametrize("name", [name for name in TRANSFORMS if TRANSFORMS[name].run_time])
some_data = given(data=st.data())
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def close(actual, expected, tolerance=1e-12):
    """To 1e-12 of the largest value: sums of up to 40 products of 53 bits, twice."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(size, 1e-30))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def case_of(data, name, dtypes=strategies.DTYPES):
    """A transform with drawn settings, and a problem."""
    stage = data.draw(strategies.transforms(name), label="transform")
    return stage, make_problem(data.draw(strategies.problem_settings(dtypes=dtypes), label="problem"))


def group_of(problem):
    """The aims of an input group: three matrices of one width."""
    settings = problem.settings
    others = [replace(settings, seed=settings.seed + 7, rows=rows, zero_rows=()) for rows in (6, 16)]
    return [problem.aim, *(Aim(matrix=make_weight(other)) for other in others)]


def bases_of(stage, problem, seed=1):
    return stage.fit(group_of(problem), problem.statistics, loss, generator(seed))


def loss(scale):
    """Of a search: any number that scales determine."""
    return float((scale - 1.5).square().sum())


@every_transform
@some_data
def test_meets_the_protocols(name, data):
    stage, problem = case_of(data, name)
    assert isinstance(stage, Transform)
    bases = bases_of(stage, problem)
    assert len(bases) == 3
    for basis, aim in zip(bases, group_of(problem), strict=True):
        assert isinstance(basis, Basis)
        assert basis.kind == name
        rotated = basis.weight(aim.matrix)
        assert (rotated.shape, rotated.dtype) == (aim.matrix.shape, aim.matrix.dtype)
        assert bool(rotated.isfinite().all())


@every_transform
@some_data
def test_weights_come_back(name, data):
    stage, problem = case_of(data, name, F64)
    for basis, aim in zip(bases_of(stage, problem), group_of(problem), strict=True):
        close(basis.inverse(basis.weight(aim.matrix)), aim.matrix)
        close(basis.weight(basis.inverse(aim.matrix)), aim.matrix)


@every_transform
@some_data
def test_float32_agrees_with_float64(name, data):
    stage, problem = case_of(data, name, (torch.float32,))
    w, s = problem.weight, problem.statistics
    wide = {f.name: getattr(s, f.name) for f in fields(s) if isinstance(getattr(s, f.name), torch.Tensor)}
    wide_s = replace(s, **{key: value.double() for key, value in wide.items()})
    for basis in bases_of(stage, problem)[:1]:
        # at most 2 * 7 rounds of sums, each rounded to 24 bits
        close(basis.weight(w).double(), basis.weight(w.double()), 1e-6)
        close(basis.inverse(w).double(), basis.inverse(w.double()), 1e-6)
        found, expected = basis.statistics(s), basis.statistics(wide_s)
        for key in ("gram", "drift", "residual"):
            assert getattr(found, key).dtype == torch.float32
            close(getattr(found, key).double(), getattr(expected, key), 1e-6)


@every_transform
@some_data
def test_narrow_values_are_widened(name, data):
    stage, problem = case_of(data, name, (torch.float32,))
    basis, narrow = bases_of(stage, problem)[0], problem.weight.bfloat16()
    exact(basis.weight(narrow), basis.weight(narrow.float()))
    exact(basis.inverse(narrow), basis.inverse(narrow.float()))


@every_transform
@some_data
def test_statistics_are_those_of_the_transformed_inputs(name, data):
    stage, problem = case_of(data, name, F64)
    basis, tokens = bases_of(stage, problem)[0], make_tokens(problem.settings)
    rows, width = problem.weight.shape
    to_old = basis.output(torch.eye(rows, dtype=torch.float64))  # transposed L^-1
    sums = Accumulator(width, OPTIONAL_SUMS, rows=rows, dtype=torch.float64)
    sums.add(
        basis.input(tokens.quantized),
        original=basis.input(tokens.original),
        residual=tokens.difference @ torch.linalg.inv(to_old),
    )
    found, expected = basis.statistics(problem.statistics), sums.finish()
    assert found.tokens == problem.statistics.tokens
    assert found.mean_abs is None or not stage.run_time
    if found.mean_abs is not None:
        close(found.mean_abs, expected.mean_abs)
    for key in ("gram", "drift", "residual"):
        close(getattr(found, key), getattr(expected, key))
    by_output = replace(problem.statistics, output_drift=problem.weight @ problem.statistics.drift, drift=None)
    close(basis.statistics(by_output).output_drift, basis.weight(problem.weight) @ found.drift)
    exact(found.gram, found.gram.t().contiguous())
    plain = replace(problem.statistics, drift=None, residual=None, mean_abs=None)
    assert (basis.statistics(plain).drift, basis.statistics(plain).residual) == (None, None)


@every_transform
@some_data
def test_the_transformed_quadratic_is_the_original_one(name, data):
    stage, problem = case_of(data, name, F64)
    basis, w, s = bases_of(stage, problem)[0], problem.weight, problem.statistics
    other = make_weight(replace(problem.settings, seed=problem.settings.seed + 3, zero_rows=()))
    found, expected = (
        u @ (t.gram + t.drift) @ v.t()
        for u, v, t in ((basis.weight(w), basis.weight(other), basis.statistics(s)), (w, other, s))
    )
    # L M L', of which L is known: it is what takes columns of the identity to the new basis
    to_old = basis.output(torch.eye(len(w), dtype=torch.float64)).t()
    close(
        to_old @ found @ to_old.t(),
        to_old @ torch.linalg.inv(to_old) @ expected @ torch.linalg.inv(to_old).t() @ to_old.t(),
    )


@every_transform
@some_data
def test_running_in_the_basis_is_the_dense_matrix(name, data):
    stage, problem = case_of(data, name, F64)
    x = make_tokens(problem.settings).quantized
    for basis, aim in zip(bases_of(stage, problem), group_of(problem), strict=True):
        decoded = basis.weight(aim.matrix).mul(8).round() / 8  # what a grid may make of it
        close(basis.output(basis.input(x) @ decoded.t()), x @ basis.inverse(decoded).t())


@stored_transform
@some_data
def test_the_generator_decides(name, data):
    stage, problem = case_of(data, name)
    Snapshot.of(*(b.stored for b in bases_of(stage, problem))).check(*(b.stored for b in bases_of(stage, problem)))
    wide = Aim(matrix=torch.ones(64, 64))
    first, again, other = (stage.fit([wide], None, None, generator(seed))[0].stored for seed in (3, 3, 4))
    Snapshot.of(first).check(again)
    with pytest.raises(AssertionError):
        Snapshot.of(first).check(other)


@every_transform
@some_data
def test_an_input_group_shares_its_input_side(name, data):
    stage, problem = case_of(data, name, F64)
    x = make_tokens(problem.settings).quantized
    first, *others = bases_of(stage, problem)
    for other in others:
        exact(other.input(x), first.input(x))
        exact(
            other.statistics(replace(problem.statistics, residual=None)).gram, first.statistics(problem.statistics).gram
        )


@stored_transform
@some_data
def test_stored_tensors_are_the_basis(name, data):
    stage, problem = case_of(data, name)
    s = problem.statistics
    basis = bases_of(stage, problem)[0]
    again = stage.restore(basis.shape, {key: t.clone() for key, t in basis.stored.items()})
    exact(again.weight(problem.weight), basis.weight(problem.weight))
    exact(again.inverse(problem.weight), basis.inverse(problem.weight))
    exact(again.statistics(s).gram, basis.statistics(s).gram)
    quantized = QuantizedWeight(shape=basis.shape, code=problem.grid.new_code(), grid=problem.grid, basis=basis)
    side = quantized.bits().side - problem.grid.grid.stored_bits(basis.shape).side
    assert side == 8 * sum(t.numel() * t.element_size() for t in basis.stored.values())


@every_transform
@some_data
def test_padding_is_cut_off_before_the_way_back(name, data):
    stage, problem = case_of(data, name, F64)
    rows, columns = problem.weight.shape
    padded = torch.nn.functional.pad(problem.weight, (0, 3, 0, 2))
    grid = problem.grid.grid.fit(padded, torch.ones(columns + 3, dtype=torch.float64))
    basis = bases_of(stage, problem)[0]
    code = grid.encode(padded)
    quantized = QuantizedWeight(shape=(rows, columns), code=code, grid=grid, basis=basis)
    exact(quantized.dense(torch.float64), basis.inverse(grid.decode(code)[:rows, :columns]))


@every_transform
@some_data
def test_arguments_are_left_alone(name, data):
    stage, problem = case_of(data, name)
    tokens, aims = make_tokens(problem.settings), group_of(problem)
    before = Snapshot.of(problem, tokens, aims)
    basis = stage.fit(aims, problem.statistics, loss, generator(1))[0]
    stored = Snapshot.of(basis.stored)
    basis.weight(problem.weight)
    basis.inverse(problem.weight)
    basis.statistics(problem.statistics)
    basis.output(basis.input(tokens.quantized) @ problem.weight.t())
    basis.output(tokens.difference)
    before.check(problem, tokens, aims)
    stored.check(basis.stored)


@every_transform
@some_data
def test_settings_are_frozen_and_hashable(name, data):
    stage = data.draw(strategies.transforms(name))
    assert hash(stage) == hash(replace(stage))
    assert stage == replace(stage)
    for f in fields(stage):
        with pytest.raises((AttributeError, TypeError)):
            setattr(stage, f.name, None)


@every_transform
def test_name_and_needs(name):
    assert TRANSFORMS[name].kind == name
    assert TRANSFORMS[name]().needs <= strategies.STATISTICS


@every_transform
def test_bad_settings_are_refused(name):
    for settings in strategies.bad_settings(TRANSFORMS[name]):
        strategies.assert_refused(TRANSFORMS[name], settings)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(16, 64), (5, 17), (48, 172)])
def test_what_is_stored_is_known_without_weights(name, shape):
    stage = TRANSFORMS[name]()
    aim = Aim(matrix=torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    (basis,) = stage.fit([aim], None, None, torch.Generator().manual_seed(1))
    assert {key: (t.dtype, tuple(t.shape)) for key, t in basis.stored.items()} == dict(stage.specs(shape))
    assert basis.run_time == stage.run_time
