#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| peft_fuzz::config(bytes));
