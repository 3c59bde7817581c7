"""What would make a long job fail or crawl, found in two minutes on the nodes of the job."""
