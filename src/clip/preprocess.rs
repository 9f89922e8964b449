//! preprocessor_config.json.
