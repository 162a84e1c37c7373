"""Several threads, or calls inside of one another, on one model and on several."""

import threading

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.undo import undone, undone_on_error
from tests.tiny_models import batch, tiny

OPTIONS = dict(target_modules="attention", trials=1, progress=False)


def in_threads(*functions):
    """What each returned or raised."""
    results = [None] * len(functions)

    def run(index):
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Meeting:
    """An output in whose reading all threads wait for one another, the first time."""

    def __init__(self, count):
        self.barrier, self.met = threading.Barrier(count), threading.local()

    def __call__(self, outputs):
        if not hasattr(self.met, "once"):
            self.met.once = True
            self.barrier.wait(timeout=60)
        return outputs.last_hidden_state[:, 0]


def predict(model, output="auto", kind="bert"):
    return ada.predict_ranks(model, [batch(kind)], 2, output=output, **OPTIONS)


@pytest.mark.parametrize("fast", [True, False])
def test_predictions_on_two_models_leave_the_fast_path_as_it_was(fast):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        models, meeting = [tiny("bert", 1), tiny("bert", 2)], Meeting(2)
        results = in_threads(*(lambda m=m: predict(m, meeting) for m in models))
        assert torch.backends.mha.get_fastpath_enabled() is fast
        for model, plan in zip(models, results, strict=True):
            alone = predict(model, lambda outputs: outputs.last_hidden_state[:, 0])
            assert plan.scores == alone.scores
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("wrap", [lambda model: model, Around], ids=["same", "around it"])
def test_a_model_that_is_being_predicted_is_refused(wrap):
    model = tiny("bert", 1).train()
    begun, over = threading.Event(), threading.Event()

    def wait(outputs):
        begun.set()
        over.wait(timeout=60)
        return outputs.last_hidden_state[:, 0]

    def others():
        begun.wait(timeout=60)
        try:
            calls = (
                lambda: predict(wrap(model)),
                lambda: ada.estimate_cost(wrap(model), [batch("bert")]),
                lambda: ada.model_disagreement([tiny("bert", 1), wrap(model)], [batch("bert")]),
            )
            for call in calls:
                with pytest.raises(ada.AdarankError, match="is being predicted or compared"):
                    call()
        finally:
            over.set()

    plan, error = in_threads(lambda: predict(model, wait), others)
    assert error is None and plan.ranks
    assert all(m.training and "forward" not in vars(m) for m in model.modules())
    assert predict(model, lambda outputs: outputs.last_hidden_state[:, 0]).scores == plan.scores


def test_a_prediction_inside_a_prediction_is_refused():
    model = tiny("bert", 1)

    def again(outputs):
        predict(model)

    with pytest.raises(ada.AdarankError, match="is being predicted or compared"):
        predict(model, again)
    assert predict(model).ranks


def test_models_that_share_modules_are_compared():
    inner = tiny("bert", 1)
    models = [Around(inner), Around(inner)]
    compared = ada.model_disagreement(
        models, [batch("bert")], output=lambda outputs: outputs.last_hidden_state
    )
    assert not compared.any()


def test_a_generator_of_batches_may_use_the_model():
    model = tiny("bert", 1)

    def batches():
        predict(model)
        yield batch("bert")

    assert ada.predict_ranks(model, batches(), 2, **OPTIONS).ranks


def test_layers_that_another_thread_restores():
    """What a thread watched last is forgotten, not an error in its next forward."""
    from tests.adapters.fused_models import mixed

    first, second = (ada.accelerate(mixed("llama")) for _ in range(2))
    begun, restored = threading.Event(), threading.Event()
    layer = first.base_model.model.model.layers[0].self_attn.o_proj

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def work():
        layer.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            first(**batch("llama"))
        begun.set()
        restored.wait(timeout=60)
        return second(**batch("llama")).logits.shape

    def restore():
        begun.wait(timeout=60)
        ada.restore(first)
        restored.set()

    shape, _ = in_threads(work, restore)
    assert shape[0] == 4


@pytest.mark.parametrize("context", [undone, undone_on_error])
@pytest.mark.parametrize("interrupts", [0, 1])
def test_an_interrupt_while_undoing_does_no_harm(context, interrupts):
    left = ["changed"] * 3
    errors = [KeyboardInterrupt] * interrupts

    def undo():
        while left:
            left.pop()
            if errors:
                raise errors.pop()

    with pytest.raises(KeyboardInterrupt if interrupts else ZeroDivisionError):
        with context(undo):
            raise ZeroDivisionError
    assert not left
