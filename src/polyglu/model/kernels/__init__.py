"""Fast implementations of ``polyglu.model.routing.mix_activations``: the reference's results and gradients."""
