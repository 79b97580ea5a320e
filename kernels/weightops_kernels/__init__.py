"""Matrix multiplication with GPTQ weights: the definition, CPU and Triton forms, and an nn.Module that chooses.

`reference` defines the format. `layout` rearranges a layer once, when it is loaded; `cpu` and `launch` multiply with
it; `library` registers the engines with torch, and `linear.QuantLinear` holds a layer. Needs torch; Triton is
imported when its engine is asked for.
"""
