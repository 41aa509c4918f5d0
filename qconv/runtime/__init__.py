"""Running builds: any model on disk as a working transformers model that computes from its packed weights.

    model = qconv.load(PATH)                      # or qconv.runtime.loading.load
    model(ids).logits, model.generate(ids)        # what transformers' own model can do

``PATH`` is a build of any format that qconv writes, whoever wrote it, an unquantized checkpoint, or a GGUF file.
Linears and experts stay packed in memory; experts are computed for the tokens that chose them.

    for logits in qconv.runtime.stream.stream_logits(PATH, sequences): ...

scores models that are larger than memory: all sequences (int64 [length] each) pass one layer before the next is read,
and the logits (float32 [length, vocabulary], or windows of them from ``stream_windows``) come out one sequence at a
time. ``tokenizer.load_tokenizer(PATH)`` gives the tokenizer, of GGUF files too.

After ``import qconv`` also transformers' own ``AutoModelForCausalLM.from_pretrained`` loads AWQ and GPTQ builds that it
has no loader for (``register``; it waits until transformers is imported, so that ``import qconv`` stays light).

How it is made: ``files`` opens what is on disk as the linears of an architecture, ``packed`` holds weights as their
files do, ``backends`` multiply with them, ``skeleton`` puts ``modules`` that do so into transformers' model.
``dense`` writes the dequantized model that a build stands for.
"""
