#![no_main]

libfuzzer_sys::fuzz_target!(init: peft::guard::hush(), |bytes: &[u8]| peft_fuzz::pickle(bytes));
