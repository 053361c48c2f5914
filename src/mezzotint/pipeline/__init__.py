"""From a request to a finished folder: recipe, plan, sweep, report."""
