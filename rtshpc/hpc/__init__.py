"""Clusters, containers, executors and device counters. No torch."""
