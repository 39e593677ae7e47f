"""What steers the image: self-supervised encoders and the tokens they make."""
