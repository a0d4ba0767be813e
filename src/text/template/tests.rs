use super::*;
use serde_json::json;

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
    let tokens = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    let clock = Clock::At(jiff::civil::date(2024, 7, 26).at(9, 5, 0, 0));
    let tools = json!([{ "name": "add", "parameters": { "z": 1, "a": "é<&'" } }]);
    ChatTemplate::new(source, tokens)?.render(&Conversation {
        messages,
        tools: Some(&tools),
        add_generation_prompt: true,
        clock,
    })
}

#[test]
fn a_conversation_is_rendered_as_its_template_says() {
    let turns = [message("user", "1+1?"), message("assistant", "2"), message("user", "Sure?")];
    let text = render(CHATML, &turns).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n\
         <|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn what_templates_use_is_there_and_does_what_it_does_in_python() {
    for (source, expected) in [
        ("{{ bos_token }}{{ eos_token }}{{ nothing }}", "<s></s>"),
        ("{{ tools | tojson }}", r#"[{"name": "add", "parameters": {"z": 1, "a": "é<&'"}}]"#),
        ("{{ tools[0].name | tojson(indent=2) }}", "\"add\""),
        ("{{ {'b': [1, 2], 'a': none} | tojson(indent=2) }}", "{\n  \"b\": [\n    1,\n    2\n  ],\n  \"a\": null\n}"),
        ("{{ '  x '.strip() + ' y'.lstrip() + ('a,b'.split(',') | last) }}", "xyb"),
        ("{{ 'abc'.startswith('ab') }} {{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ ' t ' | trim }}", "True bc cba t"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a') }}", "aa"),
        ("{% for key, value in tools[0].parameters.items() %}{{ key }}={{ value }};{% endfor %}", "z=1;a=é<&';"),
        ("{{ messages[-1]['content'] if messages[-1] is mapping else 'no' }}", "b"),
        ("{{ (messages | selectattr('role', 'equalto', 'user') | list | length) % 2 == 1 }}", "True"),
        ("{{ strftime_now('%d %b %Y, %H:%M') }}", "26 Jul 2024, 09:05"),
        ("a\n  {%- if true %}\n  b\n  {%- endif %}\nc\n", "a  b\nc"),
        ("{% generation %}x{%- endgeneration -%} y", "xy"),
    ] {
        let turns = [message("user", "a"), message("assistant", "b")];
        assert_eq!(render(source, &turns).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn a_template_that_refuses_is_quoted_and_one_that_goes_wrong_is_named() {
    let refused = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
    assert_eq!(refused, TemplateError::Refused("roles must alternate".into()));
    let refused = render("{% for i in [1] %}{{ raise_exception(\"no\nmore\") }}{% endfor %}", &[]).unwrap_err();
    assert_eq!(refused, TemplateError::Refused("no\nmore".into()));
    assert!(matches!(render("{% for %}", &[]), Err(TemplateError::Syntax(_))));
    assert!(matches!(render("{{ nothing.more.than }}", &[]), Err(TemplateError::Failed(_))));
    assert!(matches!(render("{% include 'secret' %}", &[]), Err(TemplateError::Syntax(_))));
}

#[test]
fn a_template_without_end_ends_in_an_error_and_takes_no_memory_for_it() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{{ 'x' * 10000000000 }}",
        "{{ ('x' * 10000000) | replace('x', 'x' * 10000) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ 1 | tojson(indent=99999999999) }}{{ [1] * 90000000 | join }}",
        "{{ [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]] * 100000000 }}",
        "{{ range(0, 9999999999, 1) | list }}",
    ] {
        assert!(render(source, &[message("user", "a")]).is_err(), "{source}");
    }
}
