"""What the adapter needs of lm-evaluation-harness, where that is not installed: the documented interface of its models.

`lm_eval.api.model.TemplateLM` of version 0.4.13 turns texts into ids and leaves their scores to the subclass; rolling
windows predict each token once, with one token of context at least.
"""

import sys
from types import ModuleType


class CacheHook:
    def add_partial(self, kind, arguments, result):
        pass


class TemplateLM:
    def __init__(self):
        self.cache_hook = CacheHook()

    @property
    def tokenizer_name(self):
        raise NotImplementedError

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = []
        for context, continuation in (request.args for request in requests):
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                before = [self.prefix_token_id]
            else:
                spaces = len(context) - len(context.rstrip())
                whole = self.tok_encode(context + continuation)
                before = self.tok_encode(context[: len(context) - spaces])
                ids = whole[len(before) :]
            encoded.append(((context, continuation), before, ids))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


def get_rolling_token_windows(token_list, prefix_token, max_seq_len, context_len):
    assert context_len == 1
    whole = [prefix_token, *token_list]
    for start in range(0, len(token_list), max_seq_len):
        stop = min(start + max_seq_len, len(token_list))
        first = max(0, stop - max_seq_len)
        yield whole[first:stop], token_list[start:stop]


def make_disjoint_window(pair):
    context, predicted = pair
    return context[: len(context) - (len(predicted) - 1)], predicted


def install():
    """Puts the modules that the adapter imports among those that are loaded."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.utils")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval.api.model"].TemplateLM = TemplateLM
    modules["lm_eval.api.registry"].register_model = lambda name: lambda each: each
    modules["lm_eval.utils"].get_rolling_token_windows = get_rolling_token_windows
    modules["lm_eval.utils"].make_disjoint_window = make_disjoint_window
    sys.modules.update(modules)
