"""Which activations the neurons choose."""

FIGURES = {
    "neurotransmitter_heatmap.png": "Activation that each neuron prefers, by layer: static, and on real text",
    "layer_distribution.png": "Share of each activation in each layer: static, and on real text",
    "entropy_per_layer.png": "Mean routing entropy of each layer",
    "entropy_histogram.png": "Distribution of the routing entropy of single neurons",
    "dynamic_routing_comparison.png": "How routing shifts between arithmetic, algebra and geometry",
    "routing_shift_summary.png": "How strongly each layer's routing depends on the input",
}
STATS_FILE = "entropy_stats.json"
"""What an analysis writes: the guide's files, each figure with its alternative text."""

TEXT_FIGURES = {
    "text_routing.png": "Share of each activation, neurons by dominant activation, and entropy, by layer, on text",
    "routing_variance.png": "Parts of the variance of the routing weights, and its size, by layer",
    "routing_kinds.png": "Effect of the kind of text on routing, by layer and pair by pair",
    "routing_over_training.png": "Routing entropy and share of each activation over training steps",
}
EVOLUTION_FIGURE = "routing_over_training.png"
"""Only of several checkpoints."""
TEXT_FILE = "text_routing.json"
NEURON_FILE = "neuron_routing.safetensors"
PAGE_FILE = "analysis.html"
"""What the part on texts adds."""
