"""A chat in the browser that draws what it costs: tokens read against bytes kept.

Shows `Chat.stream`, `undo` and `regenerate` behind Gradio (`pip install "rmt_hf[demo]"`). The line of the state is
flat; the other one is what a cache of keys and values would have. Every visitor has a chat of their own. The model is
a folder with a tokenizer that has a chat template, such as 05_give_a_model_memory.py writes.

    python examples/07_gradio_chat.py reports/memory/model
"""

import argparse
from collections.abc import Iterator

import gradio as gr
import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmt_hf  # noqa: F401  # makes the Auto classes know the model
from rmt_hf.chat import Chat


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder of model and tokenizer")
parser.add_argument("--port", type=int, default=7860)
parser.add_argument("--max-new-tokens", type=int, default=100)
args = parser.parse_args()
model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
config = model.config
CACHE = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
STATE = model.memorize(tokenizer("a", return_tensors="pt").input_ids).nbytes  # of any number of tokens


def cost(read: int) -> pd.DataFrame:
    """What is kept after so many tokens."""
    return pd.DataFrame({"tokens read": read, "MB kept": [STATE / 1e6, read * CACHE / 1e6], "by": ["state", "a cache"]})


def answer(message: str, shown: list, chat: Chat | None, costs: pd.DataFrame) -> Iterator[tuple]:
    """An answer, word by word, and then what the chat has cost so far. Without a message the last one is answered."""
    chat = chat or Chat(model, tokenizer, max_new_tokens=args.max_new_tokens, do_sample=True)
    shown = [*(shown if message else shown[:-2]), {"role": "user", "content": message or chat.moment.message}]
    text = ""
    for word in chat.stream(message) if message else chat.regenerate():
        text += word
        yield "", [*shown, {"role": "assistant", "content": text}], chat, costs, costs
    costs = pd.concat([costs, cost(chat.state.positions[0])])
    yield "", [*shown, {"role": "assistant", "content": text}], chat, costs, costs


with gr.Blocks(title="rmt_hf") as demo:
    chat, costs = gr.State(None, time_to_live=3600), gr.State(cost(0))
    chatbot, message = gr.Chatbot(height=380), gr.Textbox(placeholder="A message", show_label=False)
    with gr.Row():
        again, undo = gr.Button("Answer again"), gr.Button("Undo")
    plot = gr.LinePlot(cost(0), x="tokens read", y="MB kept", color="by", height=260)
    everything = [message, chatbot, chat, costs, plot]
    message.submit(answer, everything[:-1], everything)
    again.click(lambda *given: (yield from answer("", *given)), everything[1:-1], everything)
    undo.click(lambda shown, chat: (chat.undo(), shown[:-2]), [chatbot, chat], [message, chatbot])

demo.launch(server_name="127.0.0.1", server_port=args.port)
