//! Help and the messages that people meet most often, word for word.
//!
//! After a change on purpose: `TRYCMD=overwrite cargo test --test snapshots`, then read the difference.

#[test]
fn help_and_messages() {
    trycmd::TestCases::new().env("COLUMNS", "100").env("NO_COLOR", "1").case("tests/snapshots/*.trycmd");
}
