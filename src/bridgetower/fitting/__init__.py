"""From a table to a measured model: columns, task, plan, training and report by one call."""
