//! A `config.json` of any bytes: what is read is written and read again the same.
#![no_main]

use h1::backend::DType;
use h1::model::config::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = h1_fuzz::metered(data.len(), 128, || ModelConfig::from_json(text)) else { return };
    let _ = (config.parameter_count(), config.cache_bytes(4096, 4));
    let written = config.to_json(DType::Bf16).to_string();
    let again = ModelConfig::from_json(&written).expect("a configuration that was written");
    assert_eq!(again.to_json(DType::Bf16).to_string(), written);
});
