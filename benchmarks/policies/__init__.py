"""Who should choose the tokens: a study of the policies of random-LTD. See README.md."""
