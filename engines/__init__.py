"""What generates tokens. Token ids in, token ids and log-probabilities out; knows no actor, no bus.

engine        the protocol: SampleRequest → Sample
open          the engine that a recipe asks for
chat          messages and observations → token ids, through the model's own chat template
tokenizer     a folder's tokenizer, and the tokens that end a turn

transformers_engine  any Hugging Face causal model, continuous batching: the asyncio side and the decode thread
batch         turns join and leave the running batch; one step is one forward pass
turns         a turn while it runs; stop strings; prefixes kept between turns
policy_model  the model, its weights, and whether it can be served
slots         the key-value cache and attention over rows of unlike lengths
llama_family  a faster forward pass for Llama and its relatives
sampling      logits → tokens, the same draw whatever else is in the batch
adapters      published adapters and their base as one
weights       weights as they arrive, checked against the model

vllm_engine   the same for vLLM, which has all of that itself
vllm_worker   what runs within its processes

scripted      replies from a Python function, tokenised as a model's would be (tests, oracle policies)
errors        what can go wrong
"""
