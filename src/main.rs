//! peft
fn main() {}
