"""Fast implementations of ``polyglu.model.routing``: the reference's results and gradients."""
