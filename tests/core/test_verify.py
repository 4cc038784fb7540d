"""The verifier: what holds passes, and each way of breaking a graph is caught where it stands."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compax import _jax, ir
from compax.capture import Captured
from compax.encoding import Encoded
from compax.errors import VerificationError
from compax.experiments.benchmarks import bodies
from compax.lowering import operation
from compax.models import decoder
from compax.program import Program, capture
from compax.verify import verify


def two_products(params, x):
    hidden = jnp.tanh(x @ params["first"])
    return hidden @ params["second"]


PARAMS = {"first": jnp.ones((4, 8)), "second": jnp.ones((8, 3))}


@pytest.fixture
def program() -> Program:
    return capture(two_products, PARAMS, jnp.ones((2, 4)))


def only(program: Program) -> Captured:
    (captured,) = program.graphs.values()
    return captured


def with_graph(program: Program, graph: ir.Graph, **changes) -> Program:
    ((key, captured),) = program.graphs.items()
    return program.replace(graphs={key: dataclasses.replace(captured, graph=graph, **changes)})


def with_ops(program: Program, ops) -> Program:
    return with_graph(program, dataclasses.replace(only(program).graph, ops=tuple(ops), imported=False))


@pytest.mark.parametrize("body", bodies.BODIES, ids=lambda body: body.name)
def test_what_capture_makes_is_sound(body):
    verify(capture(body.make(), *body.inputs()))


@pytest.mark.parametrize("body", bodies.BODIES, ids=lambda body: body.name)
def test_what_capture_makes_is_sound_when_evaluated(body):
    """With a changed graph around it, every operation is evaluated."""
    program = capture(body.make(), *body.inputs())
    graph = only(program).graph
    output = graph.outputs[0]
    doubled = ir.trace(lambda x: x + x, output.aval)
    value = ir.Value(output.aval)
    ours = ir.Op("compax_test_double", (output,), (value,), {}, (doubled,))
    verify(with_graph(program, ir.Graph(graph.inputs, (*graph.ops, ours), (value,), graph.constants)))


@operation("compax_test_double")
def double(call):
    return [call.operands[0] * 2]


def test_operations_change_places(program):
    first, *rest = only(program).graph.ops
    with pytest.raises(VerificationError, match=r"operand 0, f32\[2,8\], is not defined before it"):
        verify(with_ops(program, [*rest, first]))


def test_value_defined_twice(program):
    ops = only(program).graph.ops
    with pytest.raises(VerificationError, match="defined twice"):
        verify(with_ops(program, [ops[0], *ops]))


def test_output_that_nothing_defines(program):
    graph = only(program).graph
    broken = dataclasses.replace(graph, outputs=(ir.Value(graph.outputs[0].aval),))
    with pytest.raises(VerificationError, match=r"graph 'call': output 0.* is not defined"):
        verify(with_graph(program, broken))


def test_declared_dtype_does_not_hold(program):
    """The message names the entry, the operation, what it reads and where the model asked for it."""
    first, *rest = only(program).graph.ops
    value = first.outputs[0]
    declared = ir.Value(value.aval.update(dtype=jnp.bfloat16))
    ops = [dataclasses.replace(op, inputs=tuple(declared if x is value else x for x in op.inputs)) for op in rest]
    with pytest.raises(VerificationError) as raised:
        verify(with_ops(program, [dataclasses.replace(first, outputs=(declared,)), *ops]))
    message = str(raised.value)
    assert "graph 'call' > operation 0 'dot_general', which reads 'first'" in message
    assert "test_verify.py" in message
    assert "declared bf16[2,8], but re-inference gives f32[2,8]" in message


def test_equation_that_a_pass_made_is_evaluated(program):
    """An equation that agrees with what is declared is no proof where JAX did not record it."""
    first, *rest = only(program).graph.ops
    wrong = ir.Value(_jax.with_dtype(first.outputs[0].aval, jnp.bfloat16))
    equation = _jax.retyped(first.equation, dict(first.equation.params), [x.aval for x in first.inputs], [wrong.aval])
    back = _jax.conversion(equation, wrong.aval, jnp.dtype(jnp.float32))
    attributes, _ = _jax.split_parameters(back)
    ops = [
        dataclasses.replace(first, outputs=(wrong,), equation=equation),
        ir.Op("convert_element_type", (wrong,), first.outputs, attributes, (), back),
        *rest,
    ]
    graph = dataclasses.replace(only(program).graph, ops=tuple(ops))
    with pytest.raises(VerificationError, match=r"declared bf16\[2,8\], but re-inference gives f32\[2,8\]"):
        verify(with_graph(program, graph))


def test_jax_refuses_the_operands(program):
    """A transposed weight: JAX's own error, with the operation named."""
    captured = only(program)
    graph = captured.graph
    swapped = {graph.inputs[0]: graph.inputs[1], graph.inputs[1]: graph.inputs[0]}
    ops = [dataclasses.replace(op, inputs=tuple(swapped.get(x, x) for x in op.inputs)) for op in graph.ops]
    with pytest.raises(
        VerificationError, match=r"operation 0 'dot_general'.* cannot be evaluated: TypeError"
    ) as raised:
        verify(with_ops(program, ops))
    assert isinstance(raised.value.__cause__, TypeError)


def test_graph_and_tags_differ_in_number(program):
    graph = only(program).graph
    extra = dataclasses.replace(graph, inputs=(*graph.inputs, ir.Value(graph.inputs[0].aval)))
    with pytest.raises(VerificationError, match="4 inputs, but 3 are tagged"):
        verify(with_graph(program, extra))


def test_parameter_taken_twice(program):
    captured = only(program)
    tags = (captured.inputs[0], captured.inputs[0], captured.inputs[2])
    with pytest.raises(VerificationError, match="takes the parameter 'first' twice"):
        verify(with_graph(program, captured.graph, inputs=tags))


def test_lost_output(program):
    graph = dataclasses.replace(only(program).graph, outputs=())
    with pytest.raises(VerificationError, match="returns 0 values, but its caller expects 1"):
        verify(with_graph(program, graph))


def test_dropped_parameter(program):
    with pytest.raises(VerificationError, match="'second', which the program does not have"):
        verify(program.replace(params={"first": PARAMS["first"]}))


def test_parameter_of_another_shape(program):
    with pytest.raises(VerificationError, match="'second'"):
        verify(program.replace(params={**PARAMS, "second": jnp.ones((3, 8))}))


def test_frozen_path_that_does_not_exist(program):
    with pytest.raises(VerificationError, match=r"'third' is frozen"):
        verify(program.replace(frozen=frozenset({"third"})))


def test_graph_of_an_unknown_entry(program):
    ((_, signature), captured), *_ = program.graphs.items()
    with pytest.raises(VerificationError, match="a graph of the entry 'eval', but no such entry"):
        verify(program.replace(graphs={("eval", signature): captured}))


# -- bodies -----------------------------------------------------------------------------------------------------------


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


@pytest.fixture
def loop() -> Program:
    return capture(scanned, {"w": jnp.ones((3, 4, 4))}, jnp.ones((2, 4)))


def with_body(program: Program, change) -> Program:
    ops = list(only(program).graph.ops)
    index = next(i for i, op in enumerate(ops) if op.name == "scan")
    ops[index] = dataclasses.replace(ops[index], bodies=(change(ops[index].bodies[0]),))
    return with_ops(program, ops)


def test_body_that_claims_to_be_imported(loop):
    """Its change would be lost: the operation would be bound as JAX recorded it."""
    with pytest.raises(VerificationError, match="marked as imported, but is not what JAX recorded"):
        verify(with_body(loop, lambda body: dataclasses.replace(body, ops=body.ops[:-1], outputs=body.ops[0].outputs)))


def test_body_of_another_arity(loop):
    def drop(body):
        return dataclasses.replace(body, inputs=body.inputs[:1], imported=False)

    with pytest.raises(VerificationError, match="body 0 takes 1 values, but the operation gives 2"):
        verify(with_body(loop, drop))


def test_body_whose_carry_changes_dtype(loop):
    """FACTS: a scan whose carry changes its type fails only when it runs."""

    def narrow(body):
        def cast(x):
            return jax.lax.convert_element_type(x, jnp.bfloat16)

        cast_graph = ir.trace(cast, body.outputs[0].aval)
        out = ir.Value(cast_graph.outputs[0].aval)
        ops = (*body.ops, *ir.inline(cast_graph, body.outputs[:1], (out,)))
        return dataclasses.replace(body, ops=ops, outputs=(out, *body.outputs[1:]), imported=False)

    with pytest.raises(
        VerificationError, match=r"body 0 returns bf16\[2,4\] as value 0, but the operation declares f32"
    ):
        verify(with_body(loop, narrow))


def test_error_inside_a_body_names_the_path(loop):
    def mislabel(body):
        first, *rest = body.ops
        wrong = ir.Value(first.outputs[0].aval.update(dtype=jnp.float16))
        rest = [
            dataclasses.replace(op, inputs=tuple(wrong if x is first.outputs[0] else x for x in op.inputs))
            for op in rest
        ]
        return dataclasses.replace(body, ops=(dataclasses.replace(first, outputs=(wrong,)), *rest), imported=False)

    with pytest.raises(
        VerificationError,
        match=r"operation \d+ 'scan' > operation 0 'dot_general', which reads 'w'.*declared f16\[2,4\]",
    ):
        verify(with_body(loop, mislabel))


def test_value_of_an_enclosing_graph(loop):
    outer = only(loop).graph.inputs[1]

    def reach_out(body):
        return dataclasses.replace(body, outputs=(outer, *body.outputs[1:]), imported=False)

    with pytest.raises(VerificationError, match="pass it into the body as an operand"):
        verify(with_body(loop, reach_out))


def test_changed_body_of_a_custom_derivative():
    program = capture(lambda params, x: jax.nn.relu(x * params["w"]), {"w": jnp.ones(4)}, jnp.ones(4))
    ops = list(only(program).graph.ops)
    index = next(i for i, op in enumerate(ops) if op.name == "custom_jvp_call")
    body = dataclasses.replace(ops[index].bodies[0], imported=False)
    ops[index] = dataclasses.replace(ops[index], bodies=(body,))
    with pytest.raises(VerificationError, match="can only be bound as JAX recorded it"):
        verify(with_ops(program, ops))


# -- operations of ours and encodings ---------------------------------------------------------------------------------


def test_operation_of_ours_without_a_body(program):
    first, *rest = only(program).graph.ops
    ours = ir.Op("ours", first.inputs, first.outputs, {})
    with pytest.raises(VerificationError, match="needs a body that defines what it computes"):
        verify(with_ops(program, [ours, *rest]))


def test_operation_of_ours_without_a_lowering(program):
    first, *rest = only(program).graph.ops
    body = ir.Graph(first.inputs, (first,), first.outputs)
    ours = ir.Op("nobody_registered_this", first.inputs, first.outputs, {}, (body,))
    with pytest.raises(VerificationError, match="no lowering is registered"):
        verify(with_ops(program, [ours, *rest]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves(Encoded):
    """Twice the array; `broken`, it decodes to another shape than it says."""

    doubled: jax.Array
    broken: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self):
        return self.doubled.shape

    @property
    def dtype(self):
        return self.doubled.dtype

    def decode(self):
        half = self.doubled / 2
        return half[:-1] if self.broken else half

    def spec(self, spec):
        return dataclasses.replace(self, doubled=spec)

    def manual(self, spec):
        return self

    def stacked(self, length):
        return self


def test_encoded_parameters_are_followed(program):
    verify(program.replace(params={**PARAMS, "first": Halves(2 * PARAMS["first"])}))


def test_abstract_encodings_are_followed(program):
    abstract = Halves(jax.ShapeDtypeStruct((4, 8), jnp.float32))
    verify(program.replace(params={**jax.eval_shape(lambda: PARAMS), "first": abstract}))


def test_encoding_that_decodes_to_another_shape(program):
    with pytest.raises(VerificationError, match="operation 0 'dot_general', which reads 'first'"):
        verify(program.replace(params={**PARAMS, "first": Halves(2 * PARAMS["first"], broken=True)}))


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"remat": True}, {"scan": True, "remat": True}])
def test_decoder_is_sound(options):
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    verify(capture(model, *decoder.example_inputs(config)))


def test_large_unrolled_model_takes_less_than_a_second():
    config = decoder.SIZES["smollm2-135m"]
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    program = capture(model, jax.ShapeDtypeStruct((1, 32), jnp.int32))
    start = time.process_time()
    verify(program)
    assert time.process_time() - start < 1.0
