"""Which activations the neurons choose."""

FIGURES = (
    "neurotransmitter_heatmap.png",
    "layer_distribution.png",
    "entropy_per_layer.png",
    "entropy_histogram.png",
    "dynamic_routing_comparison.png",
    "routing_shift_summary.png",
)
STATS_FILE = "entropy_stats.json"
"""What an analysis writes."""
