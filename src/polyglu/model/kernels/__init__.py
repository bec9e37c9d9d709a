"""Fast implementations of ``polyglu.model.routing.mix_activations``, each with the reference's results and gradients."""
