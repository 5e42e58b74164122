//! An error with what caused it, as one line.

use std::error::Error;

/// From the outermost to the innermost, with colons between.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Transparent wrappers say the same as what they wrap.
        let this = error.to_string();
        if this != last {
            text.push_str(": ");
            text.push_str(&this);
            last = this;
        }
        cause = error.source();
    }
    text
}
