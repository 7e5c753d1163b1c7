"""The runtime in a notebook: open a bundle, then generate, classify, stream and hold a conversation, cell by cell."""

from edgetune_runtime import Runtime

runtime = Runtime.open("build/smart-home")
# %%
answer = runtime.generate("turn off the lamp in the hall", adapter="command")
print(answer.text, answer.timings.switch_us, answer.timings.ttft_ms)
# %%
label, scores = runtime.classify("is it going to rain", adapter="intent")
print(label, scores[label])
# %%
for piece in runtime.stream("washing machine finished", adapter="reply"):
    print(piece, end="")
# %%
with runtime.session(adapter="reply") as session:
    print(session.send("good morning", max_tokens=40).text)
    session.use("command")  # recomputes the history for `command`; switching back reuses the cached state
    print(session.send("turn off the lamp in the hall").text)
runtime.close()
