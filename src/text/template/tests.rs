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
        ("{{ '%s: %5.1f' | format('a', 2) }}", "a:   2.0"),
        ("{{ strftime_now('%d %b %Y, %H:%M') }}", "26 Jul 2024, 09:05"),
        ("a\n  {%- if true %}\n  b\n  {%- endif %}\nc\n", "a  bc"),
        ("a\n  {%- if true %}\n  b\n  {% endif %}\nc\n", "a  b\nc"),
        ("{% generation %}x{%- endgeneration -%} y", "xy"),
    ] {
        let turns = [message("user", "a"), message("assistant", "b")];
        assert_eq!(render(source, &turns).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn a_tag_that_is_cut_off_is_an_error() {
    for source in ["{%}", "{%", "{%%", "{%}{{ 1 }}%", "a{%}{% generation %}"] {
        assert!(matches!(render(source, &[]), Err(TemplateError::Syntax(_))), "{source}");
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

/// Lists that hold themselves twice, sixty times over.
const DOUBLED: &str =
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";

#[test]
fn a_template_without_end_ends_in_an_error_and_takes_no_memory_for_it() {
    let doubled = [
        "{{ ns.x }}",
        "{{ ns.x ~ '' }}",
        "{{ ''.join(ns.x) }}",
        "{{ ns.x | string }}",
        "{{ ns.x == [ns.x] }}",
        "{{ ns.x in 'a' }}",
        "{{ '{}'.format(ns.x) }}",
    ];
    let doubled = doubled.map(|end| format!("{DOUBLED}{end}"));
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% macro again(x) %}{{ again([x, x]) }}{% endmacro %}{{ again('a') }}",
        "{% for x in [1] recursive %}{{ loop([loop]) }}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x ~ '' }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x|chain(ns.x) %}{% endfor %}{{ ns.x ~ '' }}",
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x ~ '' }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns ~ '' }}",
        "{% set x = range(10000)|list %}{% for i in x %}{% if x == range(10000)|list %}{% endif %}{% endfor %}",
        "{% set x = [range(10000)|list] * 2 %}{% for i in range(10000) %}{% if x|min %}{% endif %}{% endfor %}",
        "{% set x = [range(10000)|list] %}{% for i in range(10000) %}{% if x is eq([range(10000)|list]) %}{% endif %}{% endfor %}",
        "{{ ([1] * 10000000000) ~ '' }}",
        "{{ [[1] * 100000] * 100000 }}",
        "{{ ('x' * 1000000 ~ [1] * 1000000) }}",
        "{{ 'x' * 10000000000 }}",
        "{{ ('x' * 10000000) | replace('x', 'x' * 10000) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ ('%(a)s' * 100000) | format(a='x' * 1000000) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ ('{:>99999}' * 100000).format(1) }}",
        "{{ ('{0}' * 100000).format('x' * 1000000) }}",
        "{{ 1 | tojson(indent=99999999999) }}{{ [1] * 90000000 | join }}",
        "{{ [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]] * 100000000 }}",
        "{{ range(0, 9999999999, 1) | list }}",
    ]
    .into_iter()
    .chain(doubled.iter().map(String::as_str))
    {
        assert!(render(source, &[message("user", "a")]).is_err(), "{source}");
    }
}

#[test]
fn instructions_that_measure_leave_every_way_through_a_template_as_it_was() {
    let source = "{% macro pair(a, b=[1, 2]) %}{% if a and b is sequence %}{{ a }}:{% for x in b if x != 2 %}{{ x }}{% if x == 3 %}\
                  {% continue %}{% endif %},{% else %}none{% endfor %}{% elif a == 'z' or not b %}z{% else %}-{% endif %};{% endmacro %}\
                  {{ pair('a') }}{{ pair('b', [2]) }}{{ pair('c', (3, 4)) }}{{ pair('z', 1) }}{{ pair('', 1) }}\
                  {% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m.role] %}{% endfor %}{{ ns.all }}\
                  {% for n in [[1, [2]], [3]] recursive %}{{ n if n is number else '(' ~ loop(n) ~ ')' }}{% endfor %}\
                  {{ 1 < 2 < 3 and 'a' in ['a'] and {'k': 1}.k == 1 }}{{ messages | map(attribute='role') | sort | join(',') }}";
    let text = render(source, &[message("user", "a"), message("assistant", "b")]).unwrap();
    assert_eq!(text, "a:1,;b:none;c:34,;z;-;['user', 'assistant'](1(2))(3)Trueassistant,user");
}
