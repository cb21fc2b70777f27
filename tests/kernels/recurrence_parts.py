"""The parts of a recurrence, called with the tensors and documents of a segment."""

from longreach.kernels.recurrence import Summary


class Parts:
    """A recurrence whose parts take what makes a problem; what is not here is the recurrence's own."""

    def __init__(self, op):
        self.op = op

    def __getattr__(self, name):
        return getattr(self.op, name)

    def forward(self, inputs, state, documents, backend="auto"):
        problem = self.op.problem(inputs, documents, backend=backend)
        return problem.implementation.forward(problem, state)

    def begin(self, inputs, documents, backend="auto"):
        return self.op.begin(self.op.problem(inputs, documents, backend=backend, exact=True))

    def summarize(self, inputs, final_state, documents, backend="auto"):
        return Summary(self.op.transition(self.op.problem(inputs, documents, backend=backend)), final_state)

    def expand(self, summary, inputs):
        return self.op.expand(summary, self.op.record(*inputs))

    def correct(self, out, inputs, state, documents, reads=None, backend="auto"):
        return self.op.correct(self.op.problem(inputs, documents, backend=backend), out, state, reads)

    def backward(self, dout, dfinal, inputs, state, documents, backend="auto"):
        return self.op.backward(self.op.problem(inputs, documents, backend=backend), dout, dfinal, state)

    def summarize_backward(self, dout, inputs, state, documents, reads=None, backend="auto"):
        return self.op.summarize_backward(self.op.problem(inputs, documents, backend=backend), dout, state, reads)
