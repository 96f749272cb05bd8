"""What a run measured: result, histogram, verdict; comparison and search."""
