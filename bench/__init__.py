"""Everything that measures or shows: workloads, measurements, reports and the command line."""
